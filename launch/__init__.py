"""What a run on many devices takes beforehand: will it fit (plan), rehearsals (local_pod), TPU machines (tpu_vm.sh)."""
