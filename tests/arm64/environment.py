"""An aarch64 Python 3.11 on an x86-64 machine, in one cache folder; nothing is installed on the host.

    $PIPELOAD_ARM64_ROOT             default: ${XDG_CACHE_HOME:-$HOME/.cache}/pipeload/arm64
    |-- system/qemu-aarch64          the emulator, a static program
    |-- system/root/                 Debian's arm64 userland
    |   `-- usr/bin/python           use this: python3.11 under the emulator
    |-- packages/                    aarch64 wheels; the userland's dist-packages is a link to it
    `-- checked                      what the above was made from

Run `python -m tests.arm64.environment` to prepare it and print the interpreter's path.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"
PYTHON_VERSION = (3, 11)
GLIBC_MINOR = 36

# qemu 7.2 of bookworm itself crashes when it imports onnxruntime; 10 does not.
SOURCES = """\
deb [arch=amd64 signed-by={keyring}] {mirror} bookworm-backports main
deb [arch=arm64 signed-by={keyring}] {mirror} bookworm main
"""
DEBIAN_PACKAGES = ("qemu-user:amd64", "python3.11-minimal", "libpython3.11-stdlib", "libstdc++6")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# Private state and an empty list of installed packages, so that apt fetches every dependency and leaves the
# host as it is. The host's own configuration (a proxy, for example) is still read, but not its hooks.
APT_CONFIGURATION = """\
#clear APT::Architectures;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::Languages;
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "amd64"; }};
APT::Default-Release "";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "{folder}/empty";
Dir::Etc::preferences "{folder}/no-preferences";
Dir::Etc::preferencesparts "{folder}/empty";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
"""

# -0 makes sys.executable this script instead of python3.11, so that the host can execute it: subprocess and
# multiprocessing then work without binfmt_misc. A user site of the host would hold x86-64 libraries.
INTERPRETER = """\
#!/bin/sh
here=${0%/*}
unset LD_PRELOAD LD_LIBRARY_PATH
export PYTHONNOUSERSITE=1 PIPELOAD_EMULATED=1
exec "$here/../../../qemu-aarch64" -L "$here/../.." -0 "$0" "$here/python3.11" "$@"
"""

EXTRAS = ("text", "vision")
TEST_REQUIREMENTS = ("hypothesis>=6.120", "onnx>=1.18", "pytest>=8.3", "pytest-timeout>=2.3", "safetensors>=0.5")
ONNXRUNTIME_WITHOUT_CONSTRAINTS = "onnxruntime==1.31.1"


class PreparationError(Exception):
    """The environment cannot be made; the message is one line: fact, value, remedy."""


def is_native() -> bool:
    """Say whether this machine is aarch64 itself, so that nothing has to be emulated."""
    return platform.machine() in ("aarch64", "arm64")


def cache_folder() -> Path:
    """Return the folder that holds the environment, whether it exists or not."""
    if chosen := os.environ.get("PIPELOAD_ARM64_ROOT"):
        return Path(chosen).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).absolute() / "pipeload" / "arm64"


def prepare() -> Path:
    """Return an aarch64 Python that can import the packages of the engine and its tests.

    On an aarch64 machine it is the running interpreter. Elsewhere it is made in `cache_folder()`: what is
    there and was made from the same recipe is kept, and an interrupted attempt leaves nothing half made.

    Raises:
        PreparationError: this machine cannot emulate, a tool is missing, or a download failed.
    """
    if is_native():
        return Path(sys.executable)
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise PreparationError(
            f"aarch64 is emulated on x86-64 Linux only, and this is {platform.machine()} {sys.platform}: "
            "use an x86-64 or aarch64 Linux machine"
        )
    folder = cache_folder()
    system, packages = folder / "system", folder / "packages"
    interpreter = system / "root" / "usr" / "bin" / "python"
    system_recipe = SOURCES + "\n".join(DEBIAN_PACKAGES) + "\n" + INTERPRETER
    packages_recipe = "\n".join(_requirements()) + "\n"
    if CONSTRAINTS.exists():
        packages_recipe += CONSTRAINTS.read_text()
    checked, recipe = folder / "checked", system_recipe + packages_recipe
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock, ThreadPoolExecutor(2) as executor:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if checked.exists() and checked.read_text() == recipe and interpreter.exists():
                return interpreter
            checked.unlink(missing_ok=True)
            jobs = [
                executor.submit(_keep_or_make, system, system_recipe, _make_system),
                executor.submit(_keep_or_make, packages, packages_recipe, _make_packages),
            ]
            for job in jobs:
                job.result()
            _check(interpreter)
            checked.write_text(recipe)
    except OSError as error:
        raise PreparationError(
            f"cannot write the aarch64 environment, {error}: make room or point PIPELOAD_ARM64_ROOT to another folder"
        ) from error
    return interpreter


def _requirements() -> list[str]:
    """Return the requirements that pyproject.toml declares for the engine, and those of its tests."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *TEST_REQUIREMENTS]
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    if not CONSTRAINTS.exists():
        requirements.append(ONNXRUNTIME_WITHOUT_CONSTRAINTS)
    return requirements


def _keep_or_make(target: Path, recipe: str, make: Callable[[Path], None]) -> None:
    stamp = target / "recipe"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    staging = target.with_name(target.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    started = time.monotonic()
    make(staging)
    (staging / "recipe").write_text(recipe)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    _say(f"{target.name}: made in {time.monotonic() - started:.1f} s")


def _make_system(target: Path) -> None:
    root, apt = target / "root", target / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial", "empty"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(SOURCES.format(mirror=_debian_mirror(), keyring=_keyring()))
    (apt / "apt.conf").write_text(APT_CONFIGURATION.format(folder=apt))
    remedy = "see that the Debian mirror can be reached, or name another one in PIPELOAD_DEBIAN_MIRROR"
    for arguments in (
        ["update", "-qq"],
        ["install", "-qq", "--yes", "--download-only", "--no-install-recommends", *DEBIAN_PACKAGES],
    ):
        command = ["apt-get", "-c", str(apt / "apt.conf"), *arguments]
        _run(command, what=f"apt-get {arguments[0]}", remedy=remedy)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        if package.name.startswith("qemu-user_"):
            _extract_emulator(package, target / "qemu-aarch64")
        else:
            command = ["dpkg-deb", "--extract", str(package), str(root)]
            _run(command, what=f"unpacking {package.name}", remedy="run it again")
    shutil.rmtree(apt)
    interpreter = root / "usr" / "bin" / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    library = root / "usr" / "local" / "lib" / "python3.11"
    library.mkdir(parents=True)
    (library / "dist-packages").symlink_to("../../../../../../packages")
    if sys.version_info[:2] == PYTHON_VERSION:
        # Compiled by the host, imports take a third of the time; byte code is the same on every machine.
        compiling = ["-m", "compileall", "-q", str(root / "usr" / "lib" / "python3.11")]
        _run([sys.executable, *compiling], what="compiling the standard library", remedy="run it again")


def _make_packages(target: Path) -> None:
    # pip takes each name literally: manylinux_2_28 does not imply the older ones.
    platforms = ["manylinux2014_aarch64"]
    platforms += [f"manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC_MINOR + 1)]
    arguments = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--retries", "2"]
    arguments += ["--disable-pip-version-check", "--root-user-action", "ignore", "--no-warn-conflicts"]
    arguments += ["--target", str(target), "--only-binary", ":all:", "--implementation", "cp"]
    arguments += ["--python-version", ".".join(map(str, PYTHON_VERSION))]
    arguments += [argument for name in platforms for argument in ("--platform", name)]
    if sys.version_info[:2] != PYTHON_VERSION:
        arguments.append("--no-compile")
    if CONSTRAINTS.exists():
        arguments += ["--constraint", str(CONSTRAINTS)]
    remedy = "see that the package index can be reached and that this Python has pip"
    _run([*arguments, *_requirements()], what="pip install for aarch64", remedy=remedy)


def _debian_mirror() -> str:
    """Return the Debian mirror that this host's own apt sources name, so that no host is named here."""
    if mirror := os.environ.get("PIPELOAD_DEBIAN_MIRROR"):
        return mirror
    records: list[str] = []
    for path in sorted(path for path in Path("/etc/apt").rglob("*") if path.suffix in (".list", ".sources")):
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        records += "\n".join(lines).split("\n\n") if path.suffix == ".sources" else lines
    for record in records:
        words = record.split()
        for word in words:
            if "main" in words and "://" in word and word.rstrip("/").endswith("/debian"):
                return word
    raise PreparationError(
        "no source in /etc/apt is a Debian archive (an address that ends in /debian): "
        "name one in PIPELOAD_DEBIAN_MIRROR"
    )


def _keyring() -> Path:
    if not KEYRING.exists():
        raise PreparationError(
            f"the Debian archive's keys are missing, {KEYRING}: install the package debian-archive-keyring"
        )
    return KEYRING


def _extract_emulator(package: Path, target: Path) -> None:
    """Write the one emulator out of a package of 370 MB."""
    arguments = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.name == "./usr/bin/qemu-aarch64" else None
                    if content is not None:
                        with open(target, "wb") as file:
                            shutil.copyfileobj(content, file)
                        target.chmod(0o755)
                        break
        except tarfile.TarError as error:
            raise PreparationError(f"unpacking {package.name} failed, {error}: run it again") from error
        finally:
            process.kill()
    if not target.exists():
        raise PreparationError(f"{package.name} holds no /usr/bin/qemu-aarch64: correct {__file__}")


def _check(interpreter: Path) -> None:
    """Import, under the emulator, the library on which all the rest depends."""
    program = "import platform, numpy, onnxruntime, psutil, tokenizers; print(platform.machine())"
    remedy = f"remove {cache_folder()} and run it again"
    machine = _run([str(interpreter), "-c", program], what="importing onnxruntime under qemu", remedy=remedy)
    if machine.strip() != "aarch64":
        raise PreparationError(f"the emulated machine is {machine.strip()!r}, not aarch64: {remedy}")


def _run(arguments: Sequence[str], *, what: str, remedy: str) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PreparationError(
            f"{what} needs the program {arguments[0]}, which is not installed: use Debian or Ubuntu"
        ) from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        faults = [line for line in lines if line.startswith(("E:", "ERROR:"))] or lines or ["no message"]
        raise PreparationError(f"{what} failed with exit code {done.returncode}, {faults[0]}: {remedy}")
    return done.stdout


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Prepare the environment and print the path of its interpreter."""
    started = time.monotonic()
    try:
        interpreter = prepare()
    except PreparationError as error:
        _say(f"error: {error}")
        return 1
    _say(f"ready after {time.monotonic() - started:.1f} s")
    print(interpreter)
    return 0


if __name__ == "__main__":
    sys.exit(main())
