"""The images and the compose file name only what exists. No engine is needed, and none was at hand."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer.main
import yaml

from api.cli import app
from api.core.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
OURS = ("migrate", "api", "reconciler", "worker")
SETTINGS = {f"LORAINIT_{name.upper()}" for name in Settings.model_fields}


def starts(command: list[str]) -> None:
    """Assert that a command line of ours leads to code that exists."""
    if command[0] == "lorainit":
        assert command[1] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    elif command[:2] == ["python", "-m"]:
        assert find_spec(command[2]) is not None
    else:
        assert command[0] == "celery"
        assert find_spec(command[command.index("-A") + 1]) is not None


def test_every_command_of_ours_exists() -> None:
    for name in OURS:
        starts(SERVICES[name]["command"])


def test_every_command_of_the_images_exists() -> None:
    commands = [json.loads(line.removeprefix("CMD ")) for line in DOCKERFILE.splitlines() if line.startswith("CMD ")]
    assert len(commands) == 2
    for command in commands:
        starts(command)


def test_the_worker_runs_the_same_command_everywhere() -> None:
    image = next(line for line in DOCKERFILE.splitlines() if line.startswith('CMD ["celery"'))
    assert json.loads(image.removeprefix("CMD ")) == SERVICES["worker"]["command"]


def test_every_setting_named_exists() -> None:
    text = DOCKERFILE + (ROOT / "docker-compose.yml").read_text() + (ROOT / ".env.example").read_text()
    assert set(re.findall(r"\bLORAINIT_[A-Z0-9_]+", text)) <= SETTINGS


def test_every_file_an_image_copies_exists_and_is_sent() -> None:
    sent = {line.strip("!/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_every_target_named_is_built() -> None:
    targets = set(re.findall(r"^FROM .* AS (\S+)$", DOCKERFILE, re.MULTILINE))
    assert {SERVICES[name]["build"]["target"] for name in OURS} <= targets


def test_our_images_have_a_version() -> None:
    assert all(re.fullmatch(r"lorainit-\w+:\d\S*", SERVICES[name]["image"]) for name in OURS)


def test_images_of_others_have_a_version_and_a_digest() -> None:
    run = [service["image"] for name, service in SERVICES.items() if name not in OURS]
    images = run + re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert len(images) == 5
    for image in images:
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", image)


def test_there_is_no_default_secret() -> None:
    """Every secret comes from the environment, and compose stops when one is missing."""
    text = (ROOT / "docker-compose.yml").read_text()
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|KEY)\w*)(.*?)\}", text)
    assert secrets
    assert all(rest.startswith(":?") for _, rest in secrets)
    for line in (ROOT / ".env.example").read_text().splitlines():
        if "PASSWORD" in line or "KEY" in line:
            assert line.endswith("=")
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH|KEY|_URL", name) and name != "LORAINIT_STORAGE_URL":
                assert ":?" in value


def test_every_variable_is_explained() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    named = set(re.findall(r"^#? ?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == named


def test_services_wait_for_what_they_need_and_volumes_are_declared() -> None:
    for service in SERVICES.values():
        for needed, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "test" in SERVICES[needed]["healthcheck"]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]


def test_nothing_of_ours_runs_as_root() -> None:
    for stage in DOCKERFILE.split("\nFROM ")[1:]:
        if re.match(r"\S+ AS (api|worker)\n", stage):
            assert "\nUSER lorainit\n" in stage


def test_the_worker_reserves_as_many_gpus_as_it_has_slots() -> None:
    worker = SERVICES["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    # `capabilities` is required, and of `count` and `device_ids` only one may be there.
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert worker["environment"]["LORAINIT_WORKER_SLOTS"] == str(device["count"])


def test_only_the_settings_say_how_many_processes_a_worker_has_and_where_it_listens() -> None:
    worker = SERVICES["worker"]
    assert worker["environment"]["LORAINIT_WORKER_DEVICE"] == "gpu"
    assert not {"-c", "-Q", "-P", "--autoscale"} & set(worker["command"])


def test_what_a_worker_fetches_from_a_hub_is_kept_in_its_volume() -> None:
    worker = SERVICES["worker"]
    (folder,) = (volume.partition(":")[2] for volume in worker["volumes"])
    assert Path(worker["environment"]["HF_HOME"]).is_relative_to(folder)


def test_processes_of_one_job_have_room_to_exchange_gradients() -> None:
    assert re.fullmatch(r"[1-9]\d*gb", SERVICES["worker"]["shm_size"])


def test_the_image_has_the_cuda_that_torch_is_built_with() -> None:
    image = re.search(r"^ARG CUDA_IMAGE=nvidia/cuda:(\d+\.\d+)", DOCKERFILE, re.MULTILINE)
    torchs = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", (ROOT / "requirements/torch.txt").read_text(), re.MULTILINE)
    assert image is not None
    assert torchs is not None
    assert image[1] == torchs[1]


def test_the_worker_can_compile() -> None:
    (stage,) = (stage for stage in DOCKERFILE.split("\nFROM ") if re.match(r"\S+ AS worker\n", stage))
    installed = re.search(r"apt-get install [^&]*", stage)
    assert installed is not None
    assert {"gcc", "g++", "libc6-dev", "python3-dev"} <= set(installed[0].split())
