"""The manifests: well formed, without secrets, for a command that exists and GPUs that its configuration needs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from pipeline.config.files import load_config
from pipeline.config.sections import Config
from pipeline.errors import ExitCode
from pipeline.runtime.topology import build_topology

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
IMAGE = "your-registry/cage-align:0.1.0"
MOUNTED = Path("/etc/cage/job.yaml")  # where the ConfigMap is mounted
NO_RETRY = [ExitCode.CONFIGURATION, ExitCode.ERROR_BUDGET]  # no other attempt can mend these
RESUMABLE = "relabel"  # the command that goes on where it stopped

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^\d+(m|Mi|Gi)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def record(required: str, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def group_spec(required: str, **properties: Any) -> dict[str, Any]:
    return record(required, rayStartParams=STRINGS, template=record("spec", spec=POD, metadata={}), **properties)


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
SECRET_REF = record("name key", name=TEXT, key=TEXT, optional=FLAG)
VARIABLE = {
    "oneOf": [
        record("name value", name=TEXT, value=TEXT),
        record("name valueFrom", name=TEXT, valueFrom=record("secretKeyRef", secretKeyRef=SECRET_REF)),
    ]
}
PROBE = record(
    "exec periodSeconds timeoutSeconds failureThreshold",
    exec=record("command", command=array(TEXT)),
    initialDelaySeconds=COUNT,
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
CONTAINER = record(
    "name image resources securityContext",
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=TEXT,
    env=array(VARIABLE),
    ports=array(record("containerPort", name={"type": "string", "maxLength": 15}, containerPort=COUNT)),
    resources=record("requests limits", requests=QUANTITIES, limits=QUANTITIES),
    securityContext=record(
        "allowPrivilegeEscalation capabilities", allowPrivilegeEscalation={"const": False}, capabilities={}
    ),
    command=array(TEXT),
    volumeMounts=array(record("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
TOLERATION = record(
    "key operator effect", key=TEXT, operator={"const": "Exists"}, effect={"enum": ["NoSchedule", "NoExecute"]}
)
VOLUME = {
    "oneOf": [
        record("name emptyDir", name=TEXT, emptyDir=record("", sizeLimit=QUANTITY, medium={"enum": ["Memory"]})),
        record("name configMap", name=TEXT, configMap=record("name", name=TEXT)),
    ]
}
POD = record(
    "containers serviceAccountName securityContext",
    containers=array(CONTAINER),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    nodeSelector=STRINGS,
    tolerations=array(TOLERATION),
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    securityContext=record("runAsNonRoot", runAsNonRoot={"const": True}, runAsUser=COUNT, fsGroup=COUNT),
    volumes=array(VOLUME),
)
NAME = {"type": "string", "maxLength": 47, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
# The fields of batch/v1 that are used here. Of onExitCodes a rule has one, and of onPodConditions.
FAILURE_RULE = {
    "oneOf": [
        record(
            "action onExitCodes",
            action={"enum": ["FailJob", "Ignore", "Count"]},
            onExitCodes=record(
                "operator values",
                containerName=TEXT,
                operator={"enum": ["In", "NotIn"]},
                values={"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1, "maximum": 255}},
            ),
        ),
        record(
            "action onPodConditions",
            action={"enum": ["FailJob", "Ignore", "Count"]},
            onPodConditions=array(record("type", type=TEXT, status={"enum": ["True", "False", "Unknown"]})),
        ),
    ]
}
JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=record("name", name=NAME),
    spec=record(
        "template backoffLimit podFailurePolicy",
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        ttlSecondsAfterFinished=COUNT,
        podFailurePolicy=record("rules", rules=array(FAILURE_RULE)),
        template=record("spec", spec=POD, metadata={}),
    ),
)
# The fields of ray.io/v1 that are used here, as in the definition of the resource: ray.io_rayjobs.yaml in
# ray-operator/config/crd/bases of github.com/ray-project/kuberay, with which they were compared on 2026-11-26 (1.7).
RAY_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record("name", name=NAME, labels=STRINGS),
    spec=record(
        "entrypoint rayClusterSpec backoffLimit shutdownAfterJobFinishes",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=record(
            "rayVersion authOptions headGroupSpec workerGroupSpecs",
            rayVersion=TEXT,
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=record(
                "version",
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds=COUNT,
                resources=record("requests limits", requests=QUANTITIES, limits=QUANTITIES),
            ),
            authOptions=record("mode", mode={"enum": ["token", "disabled"]}),
            headGroupSpec=group_spec("rayStartParams template"),
            workerGroupSpecs=array(
                group_spec(
                    "groupName replicas minReplicas maxReplicas rayStartParams template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                )
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((INFRA / "ray-job.yaml").read_text(encoding="utf-8"))
    return tree


@pytest.fixture(scope="module")
def plain_job() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((INFRA / "job.yaml").read_text(encoding="utf-8"))
    return tree


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text(encoding="utf-8"))
    return tree


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of a RayJob's machines, the head's first."""
    spec = job["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a RayJob, the head's first, or of a Job."""
    if "template" in job["spec"]:
        return [job["spec"]["template"]["spec"]]
    return [group["template"]["spec"] for group in groups(job)]


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(job) for container in pod["containers"]]


def commands_of(text: str) -> Iterator[list[str]]:
    """Every `cage ...` command in a text, split into words."""
    for line in re.findall(r"(?:^|[\"`# ])(cage (?:[a-z-]+) [^\"`\n]+)", text, flags=re.MULTILINE):
        yield shlex.split(line)


def check_command(words: list[str]) -> Config:
    """The subcommand exists, takes these options, and its configuration loads with these overrides."""
    from jobs.cli import app

    group: Any = typer.main.get_command(app)
    name, *arguments = words[1:]
    assert name in group.commands, f"no command cage {name}"
    given = group.commands[name].make_context(name, arguments).params
    path = given["config"]
    if path == MOUNTED:
        return load_config(ROOT / mounted_configuration(), given["overrides"])
    return load_config(ROOT / path.relative_to("/app" if path.is_absolute() else ""), given["overrides"])


def mounted_configuration() -> str:
    """The file that the manifests' and the README's commands put into the ConfigMap."""
    found = {
        file
        for name in ("ray-job.yaml", "job.yaml", "README.md")
        for file in re.findall(
            r"kubectl create configmap cage-job --from-file=job\.yaml=(\S+)", (INFRA / name).read_text()
        )
    }
    [only] = found
    return only


def gpus_needed(config: Config) -> tuple[float, float]:
    """GPUs of one replica and of all."""
    of_one = sum(host.model.resources.num_gpus or 0 for host in build_topology(config).hosts)
    return of_one, of_one * config.cluster.replica_range.max


def test_the_ray_job_has_the_resources_fields(job: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(RAY_JOB).validate(job)


def test_the_ray_cluster_follows_the_schema_that_ray_ships(cluster: dict[str, Any]) -> None:
    ray_spec = find_spec("ray")
    assert ray_spec is not None
    assert ray_spec.origin is not None
    schema = json.loads(Path(ray_spec.origin).with_name("autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert (
        sum(node.get("max_workers", 0) for node in cluster["available_node_types"].values()) <= cluster["max_workers"]
    )


def test_the_ray_job_runs_a_command_that_resumes(job: dict[str, Any]) -> None:
    retry, attempts, *words = shlex.split(job["spec"]["entrypoint"])
    assert retry == "/app/infra/retry.sh"
    assert int(attempts) > 1
    assert words[:2] == ["cage", RESUMABLE]
    config = check_command(words)
    assert config.cluster.address == "auto"
    assert config.output.path.startswith("s3://")
    assert job["spec"]["shutdownAfterJobFinishes"]
    # `ray job submit` ends with 1 whatever the command's code is, so KubeRay tries again what cannot succeed, too: on
    # a cluster whose workers come only when the command has begun
    assert job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in cluster["workerGroupSpecs"])


def test_the_head_computes_nothing_and_every_pod_is_probed_and_scraped(job: dict[str, Any]) -> None:
    head, *workers = groups(job)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not any("nvidia.com/gpu" in each["resources"]["limits"] for each in head["template"]["spec"]["containers"])
    assert [group["groupName"] for group in workers] == ["steady", "spot"]
    for group in (head, *workers):
        [container] = group["template"]["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        port = int(group["rayStartParams"]["metrics-export-port"])
        assert {"name": "metrics", "containerPort": port} in container["ports"]


def test_a_pod_that_is_told_to_end_has_time_to_drain(job: dict[str, Any]) -> None:
    for group in groups(job):
        pod = group["template"]["spec"]
        [seconds] = [
            int(each["value"])
            for each in pod["containers"][0]["env"]
            if each["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        ]
        assert 0 < seconds < pod["terminationGracePeriodSeconds"]


def test_the_plain_job_has_the_fields_of_kubernetes_and_tries_again_what_can_succeed(
    plain_job: dict[str, Any],
) -> None:
    jsonschema.Draft202012Validator(JOB).validate(plain_job)
    spec = plain_job["spec"]
    [pod] = pods(plain_job)
    assert pod["restartPolicy"] == "Never"  # Kubernetes refuses a podFailurePolicy otherwise
    [container] = pod["containers"]
    codes, conditions = spec["podFailurePolicy"]["rules"]
    assert codes["action"] == "FailJob"
    assert codes["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": NO_RETRY}
    assert conditions == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert spec["backoffLimit"] >= 1
    words = container["command"]
    assert words[:2] == ["cage", RESUMABLE]
    config = check_command(words)
    assert config.cluster.address is None
    of_one, of_all = gpus_needed(config)
    assert of_one == of_all == float(container["resources"]["limits"]["nvidia.com/gpu"])


@pytest.mark.parametrize(
    ("codes", "attempts", "ends", "calls"),
    [
        ([0], 4, 0, 1),
        ([1, 75, 0], 4, 0, 3),
        ([1, 1, 1, 1], 3, 1, 3),
        ([2], 4, 2, 1),
        ([3], 4, 3, 1),
        ([137, 2, 0], 4, 2, 2),
    ],
)
def test_a_command_is_repeated_unless_its_code_says_that_it_cannot_succeed(tmp_path, codes, attempts, ends, calls):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    command = tmp_path / "command.sh"
    command.write_text(
        'echo "$@" >>calls; code=$(head -n 1 codes); tail -n +2 codes >rest; mv rest codes; exit "$code"\n'
    )
    done = subprocess.run(
        ["sh", INFRA / "retry.sh", str(attempts), "sh", command, "relabel", "two words"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "RETRY_WAIT_S": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == ends
    assert (tmp_path / "calls").read_text().splitlines() == ["relabel two words"] * calls
    assert os.access(INFRA / "retry.sh", os.X_OK)


def test_manifests_mount_the_configuration_where_the_command_runs(
    job: dict[str, Any], plain_job: dict[str, Any]
) -> None:
    for pod in (pods(job)[0], pods(plain_job)[0]):
        [volume] = [each["name"] for each in pod["volumes"] if each.get("configMap") == {"name": "cage-job"}]
        [container] = pod["containers"]
        assert {"name": volume, "mountPath": str(MOUNTED.parent), "readOnly": True} in container["volumeMounts"]
    for pod in (*pods(job), *pods(plain_job)):
        mounted = [mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])


def test_pods_with_gpus_go_to_nodes_with_gpus_and_no_others_do(
    job: dict[str, Any], plain_job: dict[str, Any]
) -> None:
    for pod in (*pods(job), *pods(plain_job)):
        has_gpus = any("nvidia.com/gpu" in each["resources"]["limits"] for each in pod["containers"])
        assert (pod.get("nodeSelector") == {"nvidia.com/gpu.present": "true"}) == has_gpus
        tolerated = [each["key"] for each in pod.get("tolerations", [])]
        assert tolerated == (["nvidia.com/gpu"] if has_gpus else [])


def test_the_ray_job_has_the_gpus_of_its_configuration(job: dict[str, Any]) -> None:
    of_one, of_all = gpus_needed(check_command(shlex.split(job["spec"]["entrypoint"])[2:]))
    held = 0.0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert float(limits["nvidia.com/gpu"]) >= of_one
        assert limits == container["resources"]["requests"]
        held += group["maxReplicas"] * float(limits["nvidia.com/gpu"])
    assert held == of_all


def test_the_ray_cluster_has_the_gpus_of_its_configuration(cluster: dict[str, Any]) -> None:
    text = (INFRA / "ray-cluster.yaml").read_text(encoding="utf-8")
    [words] = commands_of(text)
    of_one, of_all = gpus_needed(check_command(words))
    workers = [node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert all(node["resources"]["GPU"] >= of_one for node in workers)
    assert sum(node["resources"]["GPU"] * node["max_workers"] for node in workers) == of_all


def test_every_command_of_the_readme_exists() -> None:
    commands = list(commands_of((INFRA / "README.md").read_text(encoding="utf-8")))
    assert len(commands) >= 4
    for words in commands:
        check_command(words)


def test_every_node_has_the_same_image_and_cache(
    job: dict[str, Any], plain_job: dict[str, Any], cluster: dict[str, Any]
) -> None:
    every = [*containers(job), *containers(plain_job)]
    assert {container["image"] for container in every} == {cluster["docker"]["image"]} == {IMAGE}
    for container in every:
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert variables["CAGE_CACHE"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert "--env CAGE_CACHE=/cache" in cluster["docker"]["run_options"]
    assert f"-t {IMAGE.removeprefix('your-registry/')} ." in (INFRA / "Dockerfile").read_text()


def test_the_cluster_asks_for_a_token(job: dict[str, Any], cluster: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/cage/.ray/auth_token": "~/.ray/auth_token"}


OVERLAYS = sorted(path.parent.name for path in INFRA.glob("overlays/*/kustomization.yaml"))


def built(folder: Path) -> list[dict[str, Any]]:
    """What `kustomize build` makes of a folder, for the fields that are used here; any other field is an error."""
    tree = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(KUSTOMIZATION).validate(tree)
    found: list[dict[str, Any]] = []
    for resource in tree["resources"]:
        path = folder / resource
        read = built(path) if path.is_dir() else yaml.safe_load_all(path.read_text(encoding="utf-8"))
        found += json.loads(json.dumps(list(read)))  # anchors are copies
    for each in tree.get("configMapGenerator", []):
        assert tree["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text(encoding="utf-8") for name in each["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": each["name"]}, "data": data})
    for patch in tree.get("patches", []):
        target = patch["target"]
        [patched] = [
            each for each in found if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        for operation in yaml.safe_load(patch["patch"]):
            change(patched, **operation)
    return found


def change(tree: Any, op: str, path: str, value: Any = None) -> None:
    """One operation of RFC 6902. What is replaced or removed has to be there."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    if isinstance(tree, list):
        assert (op, last) == ("add", "-")
        tree.append(value)
        return
    assert op == "add" or last in tree
    if op == "remove":
        del tree[last]
    else:
        tree[last] = value


KUSTOMIZATION = record(
    "apiVersion kind resources",
    apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
    kind={"const": "Kustomization"},
    resources=array(TEXT),
    configMapGenerator=array(record("name files", name=TEXT, files=array(TEXT))),
    generatorOptions=record("disableNameSuffixHash", disableNameSuffixHash={"const": True}),
    images=array(record("name newTag", name=TEXT, newTag=TEXT)),
    patches=array(record("target patch", target=record("kind name", kind=TEXT, name=TEXT), patch=TEXT)),
)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_makes_a_job_that_its_own_configuration_fits(name: str, tmp_path: Path) -> None:
    assert OVERLAYS == ["gcs", "kueue", "s3"]
    resources = {each["kind"]: each for each in built(INFRA / "overlays" / name)}
    assert set(resources) == {"RayJob", "ServiceAccount", "ConfigMap"}
    job = resources["RayJob"]
    jsonschema.Draft202012Validator(RAY_JOB).validate(job)
    [(file, text)] = resources["ConfigMap"]["data"].items()
    assert resources["ConfigMap"]["metadata"]["name"] == "cage-job"
    assert file == MOUNTED.name
    assert resources["ServiceAccount"]["metadata"]["name"] == pods(job)[0]["serviceAccountName"]
    [(key, _)] = resources["ServiceAccount"]["metadata"]["annotations"].items()
    assert key.startswith("iam.gke.io" if name == "gcs" else "eks.amazonaws.com")
    # what the pods start, up to where it would look at the bucket
    (tmp_path / "job.yaml").write_text(text)
    config = load_config(tmp_path / "job.yaml")
    assert config.output.path.startswith("gs://" if name == "gcs" else "s3://")
    assert config.cluster.address == "auto"
    of_one, of_all = gpus_needed(config)
    workers = groups(job)[1:]
    held = [float(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for pod in pods(job)[1:]]
    assert min(held) >= of_one
    assert sum(gpus * group["maxReplicas"] for gpus, group in zip(held, workers, strict=True)) == of_all
    steady, spot = (set(pod["nodeSelector"]) for pod in pods(job)[1:])
    assert spot - steady == {"cloud.google.com/gke-spot" if name == "gcs" else "karpenter.sh/capacity-type"}
    if name == "kueue":  # it admits a job with what it asks for at its start
        assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "cage"}
        assert job["spec"]["shutdownAfterJobFinishes"]
        assert not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
        assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in workers)


def test_the_overlays_name_the_image_of_the_manifests() -> None:
    for name in OVERLAYS:
        tree = yaml.safe_load((INFRA / "overlays" / name / "kustomization.yaml").read_text(encoding="utf-8"))
        for image in tree.get("images", []):
            assert f"{image['name']}:{image['newTag']}" == IMAGE


def test_the_rays_agree(job: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:40])
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


@pytest.mark.parametrize(
    "file", sorted(path for path in INFRA.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_no_file_holds_a_secret(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|-----BEGIN|://[^/\s]+:[^/\s]+@", text)
    named = re.findall(r"(?i)\b\w*(?:token|secret|password|access_key)\w*\s*[=:]\s*(\S{8,})", text)
    assert set(named) <= {"~/.ray/auth_token", "hub-token.txt"}  # paths to files that are not here
    variables = re.findall(r"- name: (\w*TOKEN\w*)\n\s+(\w+):", text)
    assert all(kind == "valueFrom" for _, kind in variables)


def test_the_image_is_built_from_what_the_repository_has() -> None:
    lines = (INFRA / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    kinds = [kind for kind, _ in instructions]
    assert kinds[0] == "FROM"
    assert set(kinds) <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    stages = [rest.split(" AS ") for kind, rest in instructions if kind == "FROM"]
    assert [name for _, name in stages] == ["packages", "cpu", "cuda"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", stages[0][0])  # an exact version
    assert {base for base, _ in stages[1:]} == {"packages"}
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().split()
    for rest in (rest for kind, rest in instructions if kind == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    install = next(rest for kind, rest in instructions if "uv pip install" in rest)
    assert "-c constraints.txt" in install


def test_the_image_does_not_run_as_root() -> None:
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    users = re.findall(r"^USER (\S+)$", text, flags=re.MULTILINE)
    assert users == ["1000", "1000"]  # one for each target
    assert all(text.index("USER 1000", text.index(f"AS {name}")) > 0 for name in ("cpu", "cuda"))
    assert re.findall(r"USER 1000\n(?:#.*\n)?CMD", text) == re.findall(r"USER 1000\n(?:#.*\n)?\w+", text)


def test_make_installs_and_runs_with_byte_code(tmp_path: Path) -> None:
    def run_make(*arguments: str) -> str:
        """What make prints where the caller's shell forbids byte code."""
        environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            ["make", f"VENV={tmp_path / 'none'}", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    installs = [line for line in run_make("--dry-run", "demo").splitlines() if "uv pip install" in line]
    assert installs
    assert all("--compile-bytecode" in line for line in installs)
    seen = run_make("--eval", 'shown: ; @echo "$${PYTHONDONTWRITEBYTECODE-unset}"', "shown")
    assert seen.strip() == "unset"
    assert "uv pip install --system --compile-bytecode" in (INFRA / "Dockerfile").read_text(encoding="utf-8")
