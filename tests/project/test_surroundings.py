"""Continuous integration, hooks, templates, citation and container definitions: what of them can be checked and run here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.processes import ROOT, egmf

PACKAGES = re.compile(r"apt-get install [^&\n]*?--no-install-recommends\s+([^&\n]+)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def check_shell(script: str, shell: str = "bash") -> None:
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"


# --- GitHub -----------------------------------------------------------------------------------------------------------


def workflow_steps() -> list[dict[str, Any]]:
    return [
        step
        for path in (ROOT / ".github/workflows").glob("*.yml")
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
    ]


def test_the_workflow_runs_what_a_change_must_pass() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] >= 60 for job in workflow["jobs"].values())
    scripts = [step["run"] for step in workflow_steps() if "run" in step]
    assert any(".ci/run" in script.splitlines() for script in scripts)
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for script in scripts:
        check_shell(re.sub(r"\$\{\{.*?\}\}", "value", script))
    for step in workflow_steps():
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    for name in re.findall(r"hashFiles\((.*?)\)", read(".github/workflows/ci.yml")):
        assert all((ROOT / file).is_file() for file in re.findall(r"'([^']+)'", name))


@pytest.mark.parametrize("name", ["bug", "feature", "question"])
def test_issue_forms_are_what_github_reads(name: str) -> None:
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "labels", "title"}
    allowed = {
        "markdown": {"value"},
        "textarea": {"label", "description", "placeholder", "value", "render"},
        "input": {"label", "description", "placeholder", "value"},
        "dropdown": {"label", "description", "multiple", "options"},
    }
    ids = []
    for part in form["body"]:
        assert set(part) <= {"type", "id", "attributes", "validations"}
        assert set(part["attributes"]) <= allowed[part["type"]]
        assert ("value" if part["type"] == "markdown" else "label") in part["attributes"]
        assert all(isinstance(option, str) for option in part["attributes"].get("options", []))
        if part["type"] != "markdown":
            ids.append(part["id"])
    assert ids
    assert len(ids) == len(set(ids))


def test_hooks_run_the_tools_of_the_makefile() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    makefile = read("Makefile")
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        program, *arguments = hook["entry"].split()
        tool = Path(program).name
        assert program == f".venv/bin/{tool}"
        line = " ".join(["$(BIN)/" + tool, *(["check"] if "check" in arguments else ["format"] if arguments else [])])
        assert line in makefile
        if hook.get("pass_filenames", True):  # mypy reads everything, which `make types` does
            command = [str(Path(sys.executable).parent / tool), *arguments, "setup.py"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


# --- citation ---------------------------------------------------------------------------------------------------------


def test_the_citation_has_what_its_format_demands() -> None:
    """Citation File Format 1.2.0: required keys, allowed types, persons and entities, an identifier's shape."""
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The egmf-trainer developers"}]
    assert "independent implementation" in " ".join(citation["message"].split())
    (paper,) = citation["references"]
    assert {"authors", "title", "type"} <= set(paper)
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])
    assert paper["url"].endswith("2601.07565")
    assert {"type", "value"} <= set(paper["identifiers"][0]) <= {"type", "value", "description"}
    assert paper["identifiers"][0]["type"] in ("doi", "url", "swh", "other")


def test_the_licence_is_whole() -> None:
    text = read("LICENSE")
    assert "Version 2.0, January 2004" in text
    assert [int(n) for n in re.findall(r"^   (\d)\. [A-Z]", text, re.MULTILINE)] == list(range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


# --- containers -------------------------------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for line in lines if line for word, _, rest in [line.partition(" ")]]


def apptainer() -> dict[str, str]:
    """Section -> its text; the header is the section ''."""
    parts = re.split(r"^%(\w+)\n", read("apptainer.def"), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def copied() -> list[str]:
    """What the Dockerfile copies from the checkout."""
    return [name for word, rest in dockerfile() if word == "COPY" for name in rest.split()[:-1]]


def defaults() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in dockerfile() if word == "ARG")


def test_the_dockerfile_is_sound() -> None:
    lines = dockerfile()
    known = {"ARG", "FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in lines} == known
    (base,) = (rest for word, rest in lines if word == "FROM")
    assert re.fullmatch(r"nvidia/cuda:\$\{CUDA\}-devel-ubuntu\$\{UBUNTU\}", base)
    assert [rest for word, rest in lines if word == "USER"] == ["egmf"]  # not root
    assert "useradd" in "".join(rest for word, rest in lines if word == "RUN")
    assert dict(lines)["ENTRYPOINT"] == '["egmf"]'
    assert "never been built" in read("Dockerfile").partition("FROM")[0]
    set_here = {*defaults(), *re.findall(r"(\w+)=", " ".join(rest for word, rest in lines if word == "ENV"))}
    for word, rest in lines:
        if word == "RUN":
            check_shell(rest, "sh")
            assert set(re.findall(r"\$\{?(\w+)", rest)) <= set_here
            assert "apt-get install" not in rest or "rm -rf /var/lib/apt/lists/*" in rest
    assert all((ROOT / name).exists() for name in copied())
    ignored = read(".dockerignore").split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied())


def test_the_apptainer_definition_is_sound() -> None:
    sections = apptainer()
    head = dict(line.split(": ", 1) for line in sections[""].splitlines() if re.match(r"[A-Z]\w+: ", line))
    assert head == {"Bootstrap": "docker", "From": "nvidia/cuda:{{ CUDA }}-devel-ubuntu{{ UBUNTU }}"}
    assert "never been built" in sections[""]
    arguments = dict(line.strip().split("=", 1) for line in sections["arguments"].splitlines() if line.strip())
    assert set(re.findall(r"\{\{ (\w+) \}\}", read("apptainer.def"))) == set(arguments)
    pairs = [line.split() for line in sections["files"].splitlines() if line.strip()]
    assert all(target == f"/opt/src/{source}" for source, target in pairs)
    for name in ("post", "environment", "runscript", "test"):
        check_shell(re.sub(r"\{\{ (\w+) \}\}", r"${\1}", sections[name]), "sh")
    # both definitions make the same environment
    assert arguments == defaults()
    assert [source for source, _ in pairs] == copied()
    docker = " && ".join(rest for word, rest in dockerfile() if word == "RUN")
    post = re.sub(r"\{\{ (\w+) \}\}", r"${\1}", sections["post"].replace("\\\n", ""))
    for pattern in (PACKAGES, re.compile(r"(pip install [^&;\n]+)")):
        in_docker, in_post = ([" ".join(found.split()) for found in pattern.findall(text)] for text in (docker, post))
        assert in_docker == in_post
        assert in_docker


def test_the_versions_are_those_of_the_project() -> None:
    torch = re.search(r"^TORCH \?= torch==(\S+)", read("Makefile"), re.MULTILINE)
    assert torch is not None
    assert defaults()["TORCH"] == torch[1]
    assert f"torch=={torch[1]}" in read(".github/workflows/ci.yml")
    major, minor, _ = defaults()["CUDA"].split(".")
    assert defaults()["TORCH_CUDA"] == f"cu{major}{minor}"
    for text in (read("Dockerfile"), read("apptainer.def")):
        for extra in re.findall(r'"\.\[(\w+)\]"', text):
            assert f'"{extra}": [' in read("setup.py")


def test_the_images_own_test_passes_here() -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-euc", apptainer()["test"]], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "egmf-trainer" in done.stdout


def test_the_line_for_slurm_starts_the_image(tmp_path: Path) -> None:
    """The --setup of the definition's help, in the script that `egmf launch slurm` writes."""
    found = re.search(r"--setup '(.*)'", apptainer()["help"])
    assert found is not None
    script = egmf(
        "launch",
        "slurm",
        "tiny",
        "--out",
        str(tmp_path / "r"),
        "--procs-per-node",
        "2",
        "--dry-run",
        "--setup",
        found[1],
    ).stdout
    check_shell(script)
    lines = script.splitlines()
    at = lines.index(found[1])
    train = next(line for line in lines if line.startswith("train=("))
    assert lines.index(train) < at < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    run = f"python=/login/python run=/r\n{train}\n{found[1]}\n" + 'printf "%s\\n" "${train[@]}"'
    words = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split()
    assert words[:7] == [
        "apptainer", "exec", "--nv", "/shared/egmf.sif", "/opt/egmf/bin/python", "-m", "trainer",
    ]  # fmt: skip


def test_the_debian_packages_are_known() -> None:
    """The image's packages, by the lists of this machine: all of them are in Debian and in Ubuntu."""
    known = (
        subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True) if shutil.which("apt-cache") else None
    )
    names = set(known.stdout.split()) if known else set()
    if len(names) < 10_000:
        pytest.skip("no lists of Debian's packages here (apt-get update brings them)")
    text = " ".join(rest for word, rest in dockerfile() if word == "RUN")
    (wanted,) = PACKAGES.findall(text)
    assert set(wanted.split()) <= names
