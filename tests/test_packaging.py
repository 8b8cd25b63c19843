# SPDX-License-Identifier: Apache-2.0
"""What gets installed. FUSED_INPAINT_PACKAGING=1 adds the slow half, which installs into new environments."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fused_inpaint

ROOT = Path(__file__).resolve().parents[1]
slow = pytest.mark.skipif(not os.environ.get("FUSED_INPAINT_PACKAGING"), reason="FUSED_INPAINT_PACKAGING is not set")
needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")

PROBE = """
import json, sys
import fused_inpaint, fused_inpaint.models, torch
from fused_inpaint import _extension
ones = torch.ones(1, 1, 5, 5)
with fused_inpaint.use_backend("reference"):
    y, mask = fused_inpaint.ops.partial_conv2d(ones, ones, torch.ones(1, 1, 3, 3))
assert torch.equal(y, torch.full((1, 1, 3, 3), 9.0)), y
json.dump({"package": fused_inpaint.__file__, "models": fused_inpaint.models.__file__,
           "error": _extension.native_error(), "info": _extension.build_info()}, sys.stdout)
"""


def project():
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    found = {f"fused_inpaint.{p.parent.relative_to(ROOT).as_posix()}" for p in ROOT.glob("models/**/__init__.py")}
    found |= {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("fused_inpaint/**/__init__.py")}
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(name.replace("/", ".") for name in found)


def test_no_folder_hides_the_mapped_models():
    assert not (ROOT / "fused_inpaint" / "models").exists()


def test_requirements_are_few_and_have_no_upper_pins():
    metadata = project()["project"]
    assert metadata["dependencies"] == ["torch>=2.10", "numpy", "safetensors", "Pillow"]
    users = [r for name, extra in metadata["optional-dependencies"].items() if name != "lint" for r in extra]
    assert [r for r in users if re.search(r"==\d|<|~=", r)] == []


def test_build_does_not_require_torch():
    assert not any("torch" in requirement for requirement in project()["build-system"]["requires"])


def test_pre_commit_has_the_pins_of_the_lint_extra():
    pins = set(re.findall(r'"([\w-]+==[\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text()))
    assert pins and pins <= set(project()["project"]["optional-dependencies"]["lint"])


def test_sources_name_their_licence():
    folders = ("csrc", "fused_inpaint", "models", "benchmarks", "tests", "examples")
    sources = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    sources = [p for p in [*sources, ROOT / "setup.py"] if p.suffix in (".py", ".h", ".cpp", ".cuh", ".cu")]
    missing = [p for p in sources if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]]
    assert [p.relative_to(ROOT).as_posix() for p in missing] == []


def test_installed_metadata():
    distribution = importlib.metadata.distribution("fused-inpaint")
    assert distribution.version == fused_inpaint.__version__
    scripts = [entry.value for entry in distribution.entry_points if entry.name == "fused-inpaint"]
    assert scripts == ["fused_inpaint.cli:main"]


def test_unknown_build_choice_is_refused():
    environment = {**os.environ, "FUSED_INPAINT_BUILD": "gpu"}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "FUSED_INPAINT_BUILD must be auto, cpu, cuda or none, got 'gpu'" in result.stderr
    assert "Traceback" not in result.stderr


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def script(path, text):
    return program(path, f"#!/bin/sh\n{text}\n")


@pytest.mark.parametrize("text", ["not a program", "#!/bin/sh\nexit 3\n"])
def test_compiler_that_does_not_run_is_none(text, tmp_path):
    compiler = program(tmp_path / "compiler", text)
    environment = {**os.environ, "FUSED_INPAINT_BUILD": "cpu", "CXX": str(compiler)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert f"no C++ compiler was found (CXX={compiler} is not on PATH, or does not run)" in result.stderr


# setup.py's functions, as a torch that has CUDA lets them run.
DECIDE = """
import runpy, sys, torch
sys.argv, (choice, compiler) = ["setup.py", "--version"], sys.argv[1:]
torch.cuda._is_compiled = torch.cuda.is_available = lambda: True
torch.version.cuda = "13.0"
print(runpy.run_path("setup.py")["decide"](choice, torch, [compiler]))
from torch.utils import cpp_extension
print(cpp_extension.CUDA_HOME)
"""


def decided(path, compiler="true", choice="auto", before="", **environment):
    """(kind, reason) and the toolkit, as printed; a compiler that links everything, unless another is given."""
    hidden = ("CUDA_HOME", "CUDA_PATH", "FUSED_INPAINT_BUILD", "LDFLAGS")
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    environment = {**inherited, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", **environment}
    command = [sys.executable, "-c", before + DECIDE, choice, str(compiler)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-2:]


CUDA = str(("cuda", ""))


@pytest.mark.parametrize("way", ["script", "link"])
def test_toolkit_is_that_of_the_nvcc_which_path_leads_to(way, tmp_path):
    toolkit, path = tmp_path / "toolkit", tmp_path / "path/bin"
    if way == "script":
        nvcc = script(toolkit / "bin/nvcc", f"echo '#$ TOP={toolkit}/bin/..' >&2")
        script(path / "nvcc", f'exec {nvcc} "$@"')
    else:
        nvcc = script(toolkit / "bin/nvcc", "")
        path.mkdir(parents=True)
        (path / "nvcc").symlink_to(nvcc)
    assert decided(path) == [CUDA, str(toolkit)]
    assert decided(path, CUDA_HOME="/elsewhere") == [CUDA, "/elsewhere"]
    assert decided(path, CUDA_PATH="/elsewhere") == [CUDA, "/elsewhere"]


@pytest.mark.parametrize("text", ["exit 3", "echo '#$ TOP=/nowhere' >&2", "printf '\\377' >&2", None])
def test_nvcc_that_does_not_say_where_it_is(text, tmp_path):
    """Then torch's guess stays."""
    nvcc = tmp_path / "path/nvcc"
    program(nvcc, "not a program") if text is None else script(nvcc, text)
    assert decided(tmp_path / "path") == [CUDA, str(tmp_path)]


def test_nvcc_that_does_not_answer(tmp_path):
    script(tmp_path / "path/nvcc", "exec sleep 100")
    impatient = (
        "import subprocess; run = subprocess.run; subprocess.run = lambda *a, **k: run(*a, **{**k, 'timeout': 1})"
    )
    assert decided(tmp_path / "path", before=impatient) == [CUDA, str(tmp_path)]


def test_nvcc_is_not_asked_where_the_cpu_is_chosen(tmp_path):
    script(tmp_path / "path/nvcc", "exec sleep 100")
    assert decided(tmp_path / "path", choice="cpu")[0] == str(("cpu", "FUSED_INPAINT_BUILD=cpu was set"))


def test_toolkit_without_its_runtime_is_none(tmp_path):
    """Which a linker would say after minutes."""
    text = (
        'cudart=no; found=no; for a; do [ "$a" = -lcudart ] && cudart=yes; [ -e "${a#-L}/libcudart.so" ] && found=yes'
    )
    linker = script(tmp_path / "c++", text + "; done; [ $cudart$found != yesno ]")
    toolkit, other = tmp_path / "toolkit", tmp_path / "other"
    for folder in (toolkit / "lib64", other):
        folder.mkdir(parents=True)
    given = {"compiler": linker, "CUDA_HOME": str(toolkit)}
    reason = f"the linker finds no libcudart, with the CUDA toolkit {toolkit} (is CUDA_HOME its folder?)"
    assert decided(tmp_path, **given)[0] == str(("cpu", reason))
    assert decided(tmp_path, **{**given, "compiler": "false"})[0] == CUDA, "the build shows what ails the linker"
    (other / "libcudart.so").touch()
    assert decided(tmp_path, **given, LDFLAGS=f"-L{other}")[0] == CUDA
    (toolkit / "lib64/libcudart.so").touch()
    assert decided(tmp_path, **given)[0] == CUDA


class Environment:
    """A new virtual environment, with this one's packages in sight if `dependencies` names a folder of them."""

    def __init__(self, folder, dependencies):
        self.folder = folder
        self.python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if dependencies is not None:
            scheme = {"base": str(folder), "platbase": str(folder)}
            purelib = Path(sysconfig.get_path("purelib", "posix_prefix", vars=scheme))
            (purelib / "dependencies.pth").write_text(f"{dependencies}\n")

    def run(self, *command, cwd, succeeds=True, **environment):
        hidden = ("FUSED_INPAINT_", "PYTHONPATH", "VIRTUAL_ENV", "CXX")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        result = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )
        output = result.stdout + result.stderr
        assert (result.returncode == 0) == succeeds, output
        assert not re.search(r"(Collecting|Downloading) torch\b", output), output
        return output if not succeeds else result.stdout

    def pip(self, *arguments, cwd, succeeds=True, **environment):
        command = (self.python, "-m", "pip", "--disable-pip-version-check", *arguments)
        return self.run(*command, cwd=cwd, succeeds=succeeds, **environment)

    def probe(self, cwd):
        return json.loads(self.run(self.python, "-c", PROBE, cwd=cwd))


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    """Links to the installed packages, less this project and the build tools: torch without installing it again."""
    folder = tmp_path_factory.mktemp("dependencies")
    ours = ("fused_inpaint", "fused-inpaint", "__editable__", "__pycache__")
    tools = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence", "ninja", "wheel")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith((*ours, *tools)) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path, dependencies):
    return Environment(tmp_path / "venv", dependencies)


@pytest.fixture
def bare(tmp_path):
    return Environment(tmp_path / "bare", None)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, with nothing that was built in the original."""
    built = ("build", "dist", "*.egg-info", "*.so", "_build.json", "__pycache__", ".git", ".venv*", ".*_cache")
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(*built)))


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@slow
@needs_compiler
@pytest.mark.parametrize("options", [(), ("--no-build-isolation",), ("--config-settings", "editable_mode=strict")])
def test_editable(environment, checkout, elsewhere, options):
    if "--no-build-isolation" in options:
        environment.pip("install", "setuptools>=77", "ninja", cwd=elsewhere)
    environment.pip("install", "-e", ".", *options, cwd=checkout)
    # A strict install has links, not an import hook, so at the root of the checkout the bare sources come first.
    strict = "editable_mode=strict" in options
    for folder in (elsewhere,) if strict else (elsewhere, checkout):
        seen = environment.probe(folder)
        assert seen["error"] is None
        assert seen["info"]["kind"] in ("cpu", "cuda")
        assert Path(seen["models"]).resolve() == checkout / "models" / "__init__.py"
        assert Path(seen["package"]).resolve() == checkout / "fused_inpaint" / "__init__.py"


@slow
@needs_compiler
def test_wheel(environment, checkout, elsewhere):
    environment.pip("wheel", ".", "--no-deps", "-w", elsewhere, cwd=checkout)
    (wheel,) = elsewhere.glob("*.whl")
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = [name for name in names if name.endswith("/top_level.txt")]
        assert archive.read(top_level).decode().split() == ["fused_inpaint"]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fused_inpaint"}
    sources = {p.relative_to(checkout).as_posix() for p in (checkout / "fused_inpaint").rglob("*") if p.is_file()}
    sources |= {f"fused_inpaint/{p.relative_to(checkout).as_posix()}" for p in (checkout / "models").rglob("*.*")}
    assert sources - set(names) == set()
    assert "fused_inpaint/_build.json" in names
    assert any(re.fullmatch(r"fused_inpaint/_C\..*so", name) for name in names)

    environment.pip("install", wheel, cwd=elsewhere)
    seen = environment.probe(elsewhere)
    assert seen["error"] is None
    assert Path(seen["package"]).is_relative_to(environment.folder)
    assert Path(seen["models"]).is_relative_to(environment.folder)
    assert environment.run(environment.folder / "bin" / "fused-inpaint", "info", cwd=elsewhere)


@slow
def test_sdist_holds_what_a_reader_needs(environment, checkout):
    environment.pip("install", "setuptools>=77", cwd=checkout)
    environment.run(environment.python, "setup.py", "-q", "sdist", cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {p.relative_to(checkout).as_posix() for p in (checkout / "csrc").rglob("*.*")}
    texts = {
        p.relative_to(checkout).as_posix() for folder in ("docs", "examples") for p in (checkout / folder).glob("*")
    }
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "README.md", *sources, *texts} - names == set()


@slow
def test_build_none_needs_no_torch_to_build(environment, bare, checkout, elsewhere):
    bare.pip("wheel", ".", "--no-deps", "-w", elsewhere, cwd=checkout, FUSED_INPAINT_BUILD="none")
    (wheel,) = elsewhere.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    environment.pip("install", wheel, cwd=elsewhere)
    seen = environment.probe(elsewhere)
    assert "FUSED_INPAINT_BUILD=none" in seen["error"]
    assert seen["info"]["kind"] == "none"


@slow
@needs_compiler
def test_build_none_switches_off_what_was_built(environment, checkout, elsewhere):
    environment.pip("install", "-e", ".", cwd=checkout)
    assert environment.probe(elsewhere)["error"] is None
    environment.pip("install", "-e", ".", cwd=checkout, FUSED_INPAINT_BUILD="none")
    assert "FUSED_INPAINT_BUILD=none" in environment.probe(elsewhere)["error"]


@slow
def test_without_compiler(environment, checkout, elsewhere):
    path = str(environment.folder / "bin")
    refused = environment.pip("install", "-e", ".", cwd=checkout, succeeds=False, PATH=path, FUSED_INPAINT_BUILD="cpu")
    assert "FUSED_INPAINT_BUILD=cpu cannot be done: no C++ compiler was found" in refused
    environment.pip("install", "-e", ".", cwd=checkout, PATH=path)
    seen = environment.probe(elsewhere)
    assert "no C++ compiler was found" in seen["error"]


@slow
def test_without_torch(bare, checkout):
    assert "install torch first" in bare.pip("install", "-e", ".", cwd=checkout, succeeds=False)


@slow
@needs_compiler
def test_compiler_errors_are_shown(environment, checkout):
    module = checkout / "csrc" / "module.cpp"
    module.write_text(module.read_text() + "#error broken on purpose\n")
    output = environment.pip("install", "-e", ".", cwd=checkout, succeeds=False)
    assert "broken on purpose" in output
    assert "FUSED_INPAINT_BUILD=none installs without the compiled extension" in output


@slow
@needs_compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_cuda_that_cannot_be_built_is_refused(environment, checkout):
    output = environment.pip("install", "-e", ".", cwd=checkout, succeeds=False, FUSED_INPAINT_BUILD="cuda")
    assert "FUSED_INPAINT_BUILD=cuda cannot be done: torch" in output
