"""Certificates on both protocols: served, renewed while streams are open, and kept where a new one is bad."""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.cli import EXIT_USER_ERROR, main
from cluster.config import ClusterConfig, TlsSection
from cluster.gateway.certificates import CertificateError, Certificates, read_certificate
from cluster.gateway.metrics import Metrics
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub
from tests.authority import Authority
from tests.cluster.gateway.serving import ENDLESS, Served, serve
from workers.local import LocalModel


class Mount:
    """Files as Kubernetes mounts a Secret: links through `..data`, which is replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version = folder, 0
        self.tls = TlsSection(certificate=folder / "tls.crt", key=folder / "tls.key")

    def put(self, certificate: bytes, key: bytes) -> None:
        self.version += 1
        data = self.folder / f"..{self.version}"
        data.mkdir()
        (data / "tls.crt").write_bytes(certificate)
        (data / "tls.key").write_bytes(key)
        new = self.folder / "..data_tmp"
        new.symlink_to(data.name)
        new.rename(self.folder / "..data")
        for name in ("tls.crt", "tls.key"):
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def mount(tmp_path: Path, authority: Authority) -> Mount:
    folder = tmp_path / "mount"
    folder.mkdir()
    found = Mount(folder)
    found.put(*authority.issue())
    return found


@contextmanager
def secure(model: LocalModel, tls: TlsSection, **limits: float) -> Iterator[Served]:
    files = {"certificate": str(tls.certificate), "key": str(tls.key)}
    gateway = {"http_port": 0, "grpc_port": 0, "tls": files, "limits": limits}
    with serve(model, ClusterConfig.model_validate({"gateway": gateway})) as served:
        yield served


@pytest.fixture
def served(demo: LocalModel, mount: Mount) -> Iterator[Served]:
    with secure(demo, mount.tls) as running:
        yield running


def shown(port: int, authority: Authority, protocol: str, host: str | None = "localhost") -> int:
    """The serial number of the certificate that a server shows a client."""
    context = ssl.create_default_context(cafile=str(authority.file))
    context.set_alpn_protocols([protocol])
    context.check_hostname = host is not None
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        assert connection.selected_alpn_protocol() == protocol
        assert connection.version() == "TLSv1.3"
        der = connection.getpeercert(binary_form=True)
        assert der
        return x509.load_der_x509_certificate(der).serial_number


def serial(certificate: bytes) -> int:
    return x509.load_pem_x509_certificate(certificate).serial_number


@contextmanager
def stub(served: Served, authority: Authority) -> Iterator[InferenceServiceStub]:
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with grpc.secure_channel(served.target, credentials) as channel:
        yield InferenceServiceStub(channel)


def test_a_new_certificate_is_served_and_open_streams_go_on(
    served: Served, mount: Mount, authority: Authority
) -> None:
    context = ssl.create_default_context(cafile=str(authority.file))
    certificates = served.server.certificates
    assert certificates
    chat = pb.ChatRequest(
        model="demo", messages=[pb.Message(role="user", content="What?")],
        sampling=pb.Sampling(ignore_eos=True, max_tokens=60),
    )  # fmt: skip
    with (
        httpx2.Client(verify=context, trust_env=False, timeout=30) as client,
        client.stream(
            "POST", f"{served.url}/v1/chat/completions", json={**ENDLESS, "max_tokens": 60}
        ) as response,
        stub(served, authority) as over_grpc,
    ):
        lines = response.iter_lines()
        next(lines)
        call = over_grpc.Chat(chat, timeout=30)
        next(call)
        new = authority.issue()
        mount.put(*new)
        certificates.refresh()
        for port, protocol in ((served.server.http_port, "http/1.1"), (served.server.grpc_port, "h2")):
            assert shown(port, authority, protocol) == serial(new[0])
            assert shown(port, authority, protocol, host=None) == serial(new[0])
        assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert list(call)[-1].usage.completion_tokens == 60
        page = client.get(f"{served.url}/metrics").text
    assert 'eightfold_certificate_reloads_total{outcome="ok"} 1.0' in page
    expiry = x509.load_pem_x509_certificate(new[0]).not_valid_after_utc.timestamp()
    assert float(page.split('expiry_timestamp_seconds{file="tls.crt"} ')[1].split()[0]) == expiry


def no_pem(mount: Mount, authority: Authority) -> None:
    mount.put(b"nothing", authority.issue()[1])


def another_key(mount: Mount, authority: Authority) -> None:
    mount.put(authority.issue()[0], authority.issue()[1])


def no_key(mount: Mount, authority: Authority) -> None:
    mount.put(authority.issue()[0], b"nothing")


def expired(mount: Mount, authority: Authority) -> None:
    mount.put(*authority.issue(days=-1))


def gone(mount: Mount, authority: Authority) -> None:
    (mount.folder / "..data").unlink()


def weak(mount: Mount, authority: Authority) -> None:
    mount.put(*authority.issue(key=rsa.generate_private_key(65537, 1024)))


def of_no_known_kind(mount: Mount, authority: Authority) -> None:
    mount.put(*authority.issue(key=ed25519.Ed25519PrivateKey.generate()))


BAD = {
    no_pem: "tls.crt: is no chain",
    another_key: "tls.key: is not the key",
    no_key: "tls.key: is no private key",
    expired: "tls.crt: has expired",
    gone: "tls.crt: cannot be read: No such file",
    weak: "tls.crt: OpenSSL refuses it",
    of_no_known_kind: "tls.crt: is of no kind",
}


@pytest.mark.parametrize(("spoil", "said"), BAD.items(), ids=[spoil.__name__ for spoil in BAD])
def test_a_bad_one_is_told_and_the_old_one_stays(
    spoil: Callable[[Mount, Authority], None],
    said: str,
    mount: Mount,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    certificates = Certificates(mount.tls, metrics)
    old = shown_by(certificates, authority)
    spoil(mount, authority)
    with caplog.at_level(logging.ERROR):
        certificates.refresh()
        certificates.refresh()
    assert [said in record.getMessage() for record in caplog.records] == [True], "once, not at each look"
    assert metrics.certificate_reloads.labels("failed")._value.get() == 2
    assert shown_by(certificates, authority) == old
    new = authority.issue()
    if spoil is gone:
        mount.folder.joinpath("..data").symlink_to("..1")
    mount.put(*new)
    certificates.refresh()
    assert shown_by(certificates, authority) == serial(new[0])
    spoil(mount, authority)
    with pytest.raises(CertificateError, match=said):
        Certificates(mount.tls, Metrics())


def shown_by(certificates: Certificates, authority: Authority) -> int:
    """What a client sees, without a network between."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = certificates.http_context.wrap_bio(to_server, to_client, server_side=True)
    trusting = ssl.create_default_context(cafile=str(authority.file))
    client = trusting.wrap_bio(to_client, to_server, server_hostname="localhost")
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    der = client.getpeercert(binary_form=True)
    assert der
    return x509.load_der_x509_certificate(der).serial_number


def test_a_gateway_does_not_start_with_a_bad_one(
    mount: Mount, authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another_key(mount, authority)
    description = tmp_path / "cluster.yaml"
    tls = "{certificate: mount/tls.crt, key: mount/tls.key}"
    description.write_text(f"gateway: {{http_port: 0, grpc_port: 0, tls: {tls}}}\nengine: {{tokens: 8192}}\n")
    assert main(["serve", str(description)]) == EXIT_USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("eightfold serve: gateway: tls: cannot be used: tls.key: is not the key")


def test_files_that_change_while_they_are_read_are_read_again(
    mount: Mount, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate of before and the key of after are no pair, and nobody's fault."""
    new = authority.issue()
    read = Path.read_bytes
    pending = [True]

    def swap_after_the_certificate(path: Path) -> bytes:
        found = read(path)
        if pending and path.name == "tls.crt":
            pending.clear()
            mount.put(*new)
        return found

    monkeypatch.setattr(Path, "read_bytes", swap_after_the_certificate)
    certificate, _ = read_certificate(mount.tls)
    assert certificate.chain == new[0]
    assert certificate.names == ("localhost", "127.0.0.1")
    assert "PRIVATE KEY" not in repr(certificate)


def test_the_files_are_looked_at_again_and_again(mount: Mount, authority: Authority) -> None:
    certificates = Certificates(mount.tls, Metrics())

    async def watch() -> None:
        watching = asyncio.create_task(certificates.watch(0.01))
        new = authority.issue()
        mount.put(*new)
        async with asyncio.timeout(10):
            while shown_by(certificates, authority) != serial(new[0]):
                await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(watch())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_and_weak_ciphers_are_refused(served: Served, authority: Authority) -> None:
    def greet(port: int, most: ssl.TLSVersion, ciphers: str = "ALL") -> str | None:
        context = ssl.create_default_context(cafile=str(authority.file))
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, most
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            return connection.version()

    for port in (served.server.http_port, served.server.grpc_port):
        assert greet(port, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            greet(port, ssl.TLSVersion.TLSv1_1)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            greet(port, ssl.TLSVersion.TLSv1_2, "AES128-SHA:AES256-GCM-SHA384")


def test_clear_text_is_refused_and_does_not_hang(served: Served) -> None:
    started = time.perf_counter()
    host_and_port = served.url.removeprefix("https://")
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"http://{host_and_port}/readyz", trust_env=False, timeout=20)
    with grpc.insecure_channel(served.target) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    for port in (served.server.http_port, served.server.grpc_port):
        with socket.create_connection(("127.0.0.1", port), 10) as plain:
            plain.settimeout(20)
            plain.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = until_closed(plain)
            assert b"HTTP" not in answer
    assert time.perf_counter() - started < 10


def test_who_does_not_shake_hands_is_cut(demo: LocalModel, mount: Mount) -> None:
    with secure(demo, mount.tls, header_seconds=1) as served:
        for port in (served.server.http_port, served.server.grpc_port):
            with socket.create_connection(("127.0.0.1", port), 10) as silent:
                silent.settimeout(10)
                started = time.perf_counter()
                assert until_closed(silent) == b""
                assert time.perf_counter() - started < 8


def until_closed(connection: socket.socket) -> bytes:
    said = b""
    try:
        while data := connection.recv(4096):
            said += data
    except ConnectionError:
        pass
    return said


def test_a_key_that_needs_a_password_asks_nobody(mount: Mount) -> None:
    key = load_pem_private_key(mount.tls.key.read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    mount.put(mount.tls.certificate.read_bytes(), locked)
    with pytest.raises(CertificateError, match=r"tls\.key: is encrypted"):
        read_certificate(mount.tls)
