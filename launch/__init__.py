"""Tools for runs on many devices: plan (does it fit), local_pod (rehearsals on one machine), tpu_vm.sh (TPU slices)."""
