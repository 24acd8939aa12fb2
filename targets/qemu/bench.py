"""What every run with the emulated device begins with: the work folder, the image and the gateway."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile

from disk import Disk
from gateway import Gateway

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
DATA_MIB = 32
# An emulated device on a busy machine: what takes a second there may take long here.
PATIENCE_SECONDS = float(os.environ.get("HOSTLINK_PATIENCE_SECONDS", "120"))


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--agent", help="armv7 binary (default: targets/build.sh makes it)")
    parser.add_argument("--gateway", help="host binary (default: cargo makes it)")
    return parser


class Bench:
    """A context: at its end everything that it started is stopped and its folder removed."""

    def __init__(self, given: argparse.Namespace, tls: bool = False):
        self.work = tempfile.mkdtemp(prefix="hostlink-qemu-")
        self.gateway = None
        self.device = None
        try:
            agent = given.agent or _agent()
            tls_files = _certificate(self.work) if tls else None
            self.image = os.path.join(TARGET, "image-tls" if tls else "image")
            _image(agent, self.image, tls_files and tls_files[0])
            self.disk = Disk(_data_partition(self.work), os.path.join(self.work, "disk"))
            state = os.path.join(self.work, "gateway")
            os.mkdir(state)
            self.gateway = Gateway(given.gateway or _host_binary(), state, tls_files)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and self.device is not None:
            print("---- console ----", self.device.console(), sep="\n", file=sys.stderr)
        self.close()

    def close(self) -> None:
        if self.device is not None:
            self.device.cut()
        if self.gateway is not None:
            self.gateway.stop()
        shutil.rmtree(self.work, ignore_errors=True)


def _run(command: list[str], **more) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout


def _agent() -> str:
    build = os.path.join(ROOT, "targets", "build.sh")
    return _run([build, "armv7-unknown-linux-musleabihf"]).splitlines()[-1]


def _host_binary() -> str:
    _run(["cargo", "build", "--release"], cwd=ROOT)
    return os.path.join(TARGET, "release", "hostlink-edge")


def _image(agent: str, directory: str, ca_file: str | None) -> None:
    environment = dict(os.environ)
    if ca_file:
        environment["HOSTLINK_IMAGE_CA_FILE"] = ca_file
    shared = os.path.join(TARGET, "image-debian")
    environment["HOSTLINK_IMAGE_DEBIAN"] = shared
    _run([os.path.join(HERE, "image.sh"), agent, directory], env=environment)


def _data_partition(work: str) -> bytes:
    path = os.path.join(work, "data.ext4")
    # Complete, so that the device has no rest of this to write.
    whole = "lazy_itable_init=0,lazy_journal_init=0"
    _run(["mke2fs", "-q", "-t", "ext4", "-b", "1024", "-E", whole, "-L", "data", path, f"{DATA_MIB}M"])
    with open(path, "rb") as file:
        content = file.read()
    os.unlink(path)
    return content


def _certificate(work: str) -> tuple[str, str]:
    """Self-signed, for the address under which the guest sees the host. Valid from before any build of
    the agent, since a build's time is what the guest's clock starts with, until after 2038.
    """
    certificate, key = os.path.join(work, "cert.pem"), os.path.join(work, "key.pem")
    request, settings = os.path.join(work, "request.pem"), os.path.join(work, "ca.cnf")
    _run(["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=gateway", "-keyout", key, "-out", request],
         stderr=subprocess.DEVNULL)
    with open(settings, "w") as file:
        file.write(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={work}/index\nserial={work}/serial\nnew_certs_dir={work}\n"
            "default_md=sha256\npolicy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n"
            "[names]\nsubjectAltName=IP:10.0.2.2,IP:127.0.0.1\nbasicConstraints=CA:true\n"
        )
    open(os.path.join(work, "index"), "w").close()
    _run(["openssl", "ca", "-batch", "-selfsign", "-rand_serial", "-notext", "-config", settings, "-keyfile", key,
          "-in", request, "-out", certificate, "-startdate", "20261101000000Z", "-enddate", "20461101000000Z"],
         stderr=subprocess.DEVNULL)
    return certificate, key
