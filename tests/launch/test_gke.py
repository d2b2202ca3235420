"""launch/gke.yaml: as JobSet's schema wants it, and its numbers agree with each other and with tpu_vm.sh."""

import copy
import json
import math
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "gke.yaml").read_text()
PLACEHOLDERS = {"IMAGE", "BUCKET", "QUEUE", "RUN", "SERVICE_ACCOUNT"}
SCHEMA = json.loads((ROOT / "tests" / "golden" / "jobset.json").read_text())["spec"]
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


@pytest.fixture(scope="module")
def manifest():
  return yaml.safe_load(TEXT)


@pytest.fixture(scope="module")
def job(manifest):
  (replicated,) = manifest["spec"]["replicatedJobs"]
  return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def pod(job):
  return job["template"]["spec"]


def test_it_is_a_jobset(manifest):
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert manifest["metadata"].keys() == {"name", "labels", "annotations"}
  assert all(isinstance(value, str) for value in manifest["metadata"]["annotations"].values())


def complaints(schema: dict, value, where="spec") -> list[str]:
  """Where a value departs from an OpenAPI schema, as far as Kubernetes' CRDs use it."""
  if schema.get("x-kubernetes-int-or-string"):
    return [] if type(value) in (int, str) else [f"{where} must be a number or a string"]
  if type(value) is not TYPES[schema["type"]]:
    return [f"{where} must be of type {schema['type']}"]
  if value not in schema.get("enum", [value]):
    return [f"{where} must be one of {schema['enum']}"]
  if isinstance(value, list):
    pairs = [(schema["items"], item, f"{where}[{i}]") for i, item in enumerate(value)]
  elif isinstance(value, dict):
    missing = set(schema.get("required", ())) - value.keys()
    known, rest = schema.get("properties", {}), schema.get("additionalProperties")
    unknown = set() if rest else value.keys() - known.keys()
    if missing or unknown:
      return [f"{where} misses {missing}, does not know {unknown}"]
    pairs = [(known.get(name, rest), inner, f"{where}.{name}") for name, inner in value.items()]
  else:
    pairs = []
  return [text for pair in pairs for text in complaints(*pair)]


def test_it_follows_jobsets_schema(manifest):
  assert complaints(SCHEMA, manifest["spec"]) == []


@pytest.mark.parametrize(
  "path, value, words",
  [
    ("failurePolicy.rules.0.action", "FailJob", "must be one of"),
    ("failurePolicy.rules.0.name", None, "misses {'name'}"),
    ("failurePolicy.maxRestart", 3, "does not know {'maxRestart'}"),
    ("replicatedJobs.0.replicas", "2", "must be of type integer"),
    ("replicatedJobs.0.template.spec.template.spec.containers.0.comand", [], "does not know"),
    ("replicatedJobs.0.template.spec.template.spec.nodeSelector.spot", True, "type string"),
  ],
)
def test_the_schema_is_checked(manifest, path, value, words):
  """A misspelt, missing or wrong field anywhere is found."""
  spec = copy.deepcopy(manifest["spec"])
  *names, last = path.split(".")
  node = spec
  for name in names:
    node = node[int(name) if name.isdecimal() else name]
  if value is None:
    del node[last]
  else:
    node[last] = value
  (found,) = complaints(SCHEMA, spec)
  assert words in found


def test_a_pod_for_every_host(job, pod):
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  (container,) = pod["containers"]
  resources = container["resources"]
  assert resources["requests"] == resources["limits"]
  hosts = chips // resources["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == hosts
  assert job["completionMode"] == "Indexed"  # TPU_WORKER_ID is the index
  assert f"is {chips} chips, at {chips // hosts} a host {hosts} hosts" in TEXT


def test_a_lost_pod_starts_all_again_and_a_mistake_or_waiting_does_not(manifest, job, pod):
  policy = manifest["spec"]["failurePolicy"]
  assert policy["maxRestarts"] > 0
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  codes = rule["onExitCodes"]
  assert codes == {"containerName": "main", "operator": "In", "values": [1, 2, 3]}
  assert codes["containerName"] == pod["containers"][0]["name"]
  (rule,) = policy["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  assert pod["terminationGracePeriodSeconds"] >= 30


def test_the_page_says_which_exit_codes_are_started_again(job):
  """Its table agrees with the manifest, with the command for gcluster, and with SkyPilot's file."""
  page = (ROOT / "docs" / "launching.md").read_text()
  table = page.partition("## Exit codes")[2].partition("\n## ")[0]
  again = {"yes": [], "no": []}
  for codes, word in re.findall(r"^\| ([\d, ]+) \|.*\| (yes|no)\b.*\|$", table, re.MULTILINE):
    again[word] += map(int, codes.split(", "))
  assert [0, *job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]] == again["no"]
  (gcluster,) = re.findall(r"--restart-on-exit-codes=([\d,]+)", page)
  assert [int(code) for code in gcluster.split(",")] == again["yes"]
  task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
  (first, second, third) = task["resources"]["job_recovery"]["recover_on_exit_codes"]
  assert f"after {first}, {second} and {third}." in " ".join(table.split())


def test_the_workdir_is_on_the_bucket(job, pod):
  (container,) = pod["containers"]
  (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
  (workdir,) = [word for word in container["command"] if word.startswith("--workdir=")]
  assert workdir == f"--workdir={mount['mountPath']}/RUN"
  assert mount["name"] == volume["name"]
  assert mount["mountPath"] == f"/mnt/{volume['csi']['volumeAttributes']['bucketName']}"
  assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


def test_the_container_that_mounts_has_room(job):
  """Of the driver's source: 0 is no limit, and a request that is not named is the default. The page says the same."""
  annotations = dict(job["template"]["metadata"]["annotations"])
  assert annotations.pop("gke-gcsfuse/volumes") == "true"
  assert all(isinstance(value, str) for value in annotations.values())
  sizes = ("cpu", "memory", "ephemeral-storage")
  limits = {f"gke-gcsfuse/{size}-limit": "0" for size in sizes}
  requests = {f"gke-gcsfuse/{size}-request" for size in sizes}
  assert annotations.items() >= limits.items() and annotations.keys() == limits.keys() | requests
  page = (ROOT / "docs" / "launching.md").read_text()
  (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
  assert yaml.safe_load(block) == annotations


def test_the_bucket_is_mounted_as_on_a_tpu_vm(pod):
  options = pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"].split(",")
  names = {
    "implicit-dirs": "--implicit-dirs",
    "metadata-cache:ttl-secs:0": "--metadata-cache-ttl-secs=0",
    "metadata-cache:negative-ttl-secs:0": "--metadata-cache-negative-ttl-secs=0",
    "file-system:rename-dir-limit:100000": "--rename-dir-limit=100000",
  }
  assert options == list(names)
  script = (ROOT / "launch" / "tpu_worker.sh").read_text()
  flags = re.findall(r"--(?:implicit-dirs|metadata-cache-\S+=\d+|rename-dir-limit=\d+)", script)
  assert flags == list(names.values())


def test_gcluster_mounts_the_bucket_in_the_same_way(pod):
  """docs/launching.md's command for gcluster."""
  page = (ROOT / "docs" / "launching.md").read_text()
  (mount,) = re.findall(r"--mount='(\S+)'", page)
  options = pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"]
  assert mount == f"gs://my-bucket;/mnt/my-bucket;rw;options={options}"


def test_the_command_is_the_usual_one(pod):
  (container,) = pod["containers"]
  program, *flags = container["command"][2:]
  assert program == "instructjax.main"
  (config,) = [flag for flag in flags if flag.startswith("--config=")]
  path, preset = config.removeprefix("--config=").split(":")
  assert (ROOT / path).is_file() and preset in (ROOT / "configs" / "gpt3.py").read_text()


def test_every_placeholder_is_listed_at_the_top(manifest, pod):
  header = TEXT.partition("apiVersion")[0]
  listed = set(re.findall(r"^#   ([A-Z_]+) {2,}", header, re.MULTILINE))
  assert listed == PLACEHOLDERS

  def strings(node):
    if isinstance(node, dict):
      node = list(node.values())
    if isinstance(node, list):
      return [text for child in node for text in strings(child)]
    return [node] if isinstance(node, str) else []

  used = set()
  for text in strings(manifest):
    used |= set(re.findall(r"\b[A-Z_]{3,}\b", text))
  assert used - {variable["name"] for variable in pod["containers"][0]["env"]} == listed
