"""deploy/: linted, and every command and path in it is ours. No container is built, no unit started here."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerwatch.cli import build_parser
from layerwatch.monitor.alerts.config import read_config

SERVICES = ("layerwatch-dashboard.service", "layerwatch-scan.service")
#: What a service of ours needs none of: see systemd.exec(5).
HARDENED = {
    "dynamicuser": "yes", "nonewprivileges": "yes", "protectsystem": "strict", "protecthome": "yes",
    "privatetmp": "yes", "privatedevices": "yes", "capabilityboundingset": "", "restrictnamespaces": "yes",
    "restrictaddressfamilies": "AF_UNIX AF_INET AF_INET6",
}  # fmt: skip


@pytest.fixture
def deploy(checkout: Path) -> Path:
    return checkout / "deploy"


def tool(name: str, *arguments: object, folder: Path) -> None:
    """A linter that is installed beside this interpreter; it must have nothing to say."""
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / name, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_file_is_linted(deploy: Path) -> None:
    tool("hadolint", "Containerfile", folder=deploy)


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("deploy/compose.yaml", "vendor.compose-spec"),
        ("examples/ci/github-actions.yml", "vendor.github-workflows"),
        ("examples/ci/gitlab-ci.yml", "vendor.gitlab-ci"),
    ],
)
def test_files_are_as_their_specification_says(checkout: Path, path: str, schema: str) -> None:
    tool("check-jsonschema", "--builtin-schema", schema, path, folder=checkout)


def test_yaml_is_linted(checkout: Path) -> None:
    rules = {"line-length": {"max": 110}, "document-start": "disable", "truthy": {"check-keys": False},
             "comments": {"min-spaces-from-content": 1}}  # fmt: skip
    config = yaml.safe_dump({"extends": "default", "rules": rules})
    files = [
        "deploy/compose.yaml",
        *checkout.glob("examples/ci/*.yml"),
        "examples/ci/.pre-commit-config.yaml",
    ]
    tool("yamllint", "--strict", "-d", config, *files, folder=checkout)


def instructions(deploy: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (deploy / "Containerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_the_image_gets_every_package_and_runs_as_nobody_special(checkout: Path, deploy: Path) -> None:
    found = instructions(deploy)
    copied = [
        word for name, rest in found if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ]
    assert all((checkout / path).exists() for path in copied)
    project = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    folders = re.findall(r'= "([\w/]+)"', project.partition("package-dir = {")[2].partition("}")[0])
    assert set(copied) >= {*folders, "layerwatch", "pyproject.toml", "README.md", "LICENSE"}
    allowed = (deploy / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in allowed if line.startswith("!")} == set(copied)
    last = dict(found)  # of the second stage
    assert last["USER"] == "10001:10001"
    assert last["ENTRYPOINT"] == '["layerwatch"]'
    build_parser()


def test_the_services_of_compose(deploy: Path) -> None:
    content = yaml.safe_load((deploy / "compose.yaml").read_text(encoding="utf-8"))
    assert set(content["services"]) == {"dashboard", "watchman"}
    for name, service in content["services"].items():
        command = [
            re.sub(r"\$\{LAYERWATCH_ROOT:\?.*\}", "s3://bucket/runs", word) for word in service["command"]
        ]
        options = build_parser().parse_args(command)
        assert options.command == {"dashboard": "dashboard", "watchman": "scan"}[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "user" not in service  # that of the image
        assert (deploy / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        mounted = {f"/run/secrets/{secret}" for secret in service["secrets"]}
        mounted |= {one["target"] for one in service.get("configs", ())}
        for path in re.findall(
            r"/(?:run|etc)/[\w./]+", " ".join([*command, *service["environment"].values()])
        ):
            assert path in mounted
        assert set(service["secrets"]) <= set(content["secrets"])
    dashboard = content["services"]["dashboard"]
    assert dashboard["ports"] == ["127.0.0.1:8050:8050"]
    assert "/healthz" in dashboard["healthcheck"]["test"][-1]
    compile(dashboard["healthcheck"]["test"][-1], "healthcheck", "exec")
    ignored = (deploy.parent / ".gitignore").read_text(encoding="utf-8").split()
    assert all(secret["file"].startswith("secrets/") for secret in content["secrets"].values())
    assert "/deploy/secrets/" in ignored


def unit(deploy: Path, name: str) -> dict[str, dict[str, Any]]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read(deploy / name, encoding="utf-8")
    return {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_hardened_and_its_command_is_ours(deploy: Path, name: str) -> None:
    found = unit(deploy, name)
    assert set(found) == {"Unit", "Service", "Install"}
    service = found["Service"]
    assert HARDENED.items() <= service.items()
    program, *arguments = shlex.split(service["execstart"])
    assert program == "/opt/layerwatch/bin/layerwatch"
    assert build_parser().parse_args(arguments).command in name
    cache = f"/var/cache/{service['cachedirectory']}"
    assert f"LAYERWATCH_CACHE={cache} " in service["environment"]
    assert "MemoryDenyWriteExecute" not in service  # loops are compiled
    if "token-file" in service["execstart"]:
        assert "--token-file ${CREDENTIALS_DIRECTORY}/token" in service["execstart"]
        assert service["loadcredential"].startswith("token:")
        assert "--host" not in service["execstart"]  # this machine only


def test_the_alerts_of_the_example_can_be_read(deploy: Path) -> None:
    config = read_config(deploy / "layerwatch.toml")
    assert [channel.variables() for channel in config.channels.values()] == [["SLACK_URL"]]


def test_the_page_of_operations_names_the_files_and_its_commands_are_ours(checkout: Path) -> None:
    page = (checkout / "docs" / "operations.md").read_text(encoding="utf-8")
    for path in (checkout / "deploy").iterdir():
        assert f"({Path('../deploy') / path.name})" in page or path.name.endswith(
            (".dockerignore", "secrets")
        )
    commands = re.findall(r"^layerwatch (.+?)(?: {2,}#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command))
