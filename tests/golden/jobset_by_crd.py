"""Writes jobset.json: of JobSet's schema, what launch/gke.yaml touches.

  python tests/golden/jobset_by_crd.py jobset.x-k8s.io_jobsets.yaml

The argument is the CRD of https://github.com/kubernetes-sigs/jobset, from config/components/crd/bases. Of
an object that the manifest has, all fields are kept with their types, so that a misspelt one is found; of other
objects, only that they are objects.
"""

import json
import pathlib
import sys

import yaml

HERE = pathlib.Path(__file__).parent
KEPT = ("type", "enum", "required", "additionalProperties", "x-kubernetes-int-or-string")


def compact(schema: dict, values: list) -> dict:
  """A schema without descriptions, and without what lies inside fields that none of the values has."""
  result = {key: schema[key] for key in KEPT if key in schema}
  if isinstance(result.get("additionalProperties"), dict):
    result["additionalProperties"] = compact(result["additionalProperties"], [])
  if "properties" in schema and values:
    result["properties"] = {
      name: compact(inner, [value[name] for value in values if name in value])
      for name, inner in schema["properties"].items()
    }
  if "items" in schema:
    result["items"] = compact(schema["items"], [item for value in values for item in value])
  return result


if __name__ == "__main__":
  crd = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
  (version,) = crd["spec"]["versions"]
  manifest = yaml.safe_load((HERE.parents[1] / "launch" / "gke.yaml").read_text())
  golden = {
    "source": "https://github.com/kubernetes-sigs/jobset, its CRD, by tests/golden/jobset_by_crd.py",
    "version": "main of 2026-08-18 (08dfbdf)",
    "when_to_update": "when launch/gke.yaml uses an object that is not in it, or for a newer JobSet",
    "spec": compact(version["schema"]["openAPIV3Schema"]["properties"]["spec"], [manifest["spec"]]),
  }
  text = json.dumps(golden, separators=(",", ":"))
  (HERE / "jobset.json").write_text(text.replace('"properties":{', '\n"properties":{') + "\n")
