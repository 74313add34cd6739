"""Requests that carry what no log may hold, and a search for it."""

import hashlib
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx2

from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO

_RUN = 6  # so many ids behind each other are no chance
_SECONDS = 60.0


class Canary:
    """A prompt, keys and their digests that exist nowhere else."""

    def __init__(self) -> None:
        self.word = f"canary{secrets.token_hex(8)}"
        self.key, self.wrong_key = (f"sk-{secrets.token_urlsafe(24)}" for _ in range(2))
        self.ids = tuple(Tokenizer.load(DEMO).encode(f"Who is {self.word}?"))
        assert len(self.ids) > 2 * _RUN

    @property
    def key_hash(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()

    def songs(self) -> dict[str, str]:
        """What must not be found, by what it is."""
        middle = self.ids[3 : 3 + _RUN]
        runs = {f"ids by {by!r}": by.join(map(str, middle)) for by in (", ", ",", " ", "\n")}
        keys = {"key": self.key, "wrong key": self.wrong_key, "digest of the key": self.key_hash}
        wrong = hashlib.sha256(self.wrong_key.encode()).hexdigest()
        return {"prompt": self.word, "digest of the wrong key": wrong, **keys, **runs}

    def send(self, url: str, target: str) -> None:
        """Every kind of request to a gateway that takes the key: those that go well and those that do not."""
        with httpx2.Client(base_url=url, trust_env=False, timeout=_SECONDS) as client:
            codes = [self._post(client, body, path) for body, path in self._bodies()]
            assert codes == [200, 200, 200, 200, 400, 400, 404, 400], codes
            assert self._post(client, self._chat(), "/v1/chat/completions", self.wrong_key) == 401
            raw = client.post("/v1/completions", content=f'{{"{self.word}', headers=self._headers())
            assert raw.status_code == 400
            assert (
                client.get(f"/v1/{self.word}?api_key={self.key}", headers=self._headers()).status_code == 404
            )
            long = client.get("/v1/models", headers=self._headers() | {"x-prompt": self.word * 3000})
            assert long.status_code == 431
            self._leave(client)
        self._call(target)

    def pages(self, url: str) -> dict[str, str]:
        """What the gateway shows to whoever has the key."""
        with httpx2.Client(
            base_url=url, trust_env=False, headers=self._headers(), timeout=_SECONDS
        ) as client:
            paths = ("/metrics", "/status", "/version", "/openapi.json", "/v1/models", "/healthz", "/readyz")
            return {path: client.get(path).raise_for_status().text for path in paths}

    def _chat(self, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"Who is {self.word}?"}]
        return {"model": "demo", "messages": messages, "max_tokens": 4} | options

    def _bodies(self) -> list[tuple[dict[str, Any], str]]:
        chat, plain = "/v1/chat/completions", "/v1/completions"
        ids = {"model": "demo", "prompt": list(self.ids), "max_tokens": 4}
        return [
            (self._chat(), chat),
            (self._chat(stream=True, logprobs=True, stop=[self.word], user=self.word), chat),
            (ids | {"stream": True}, plain),
            (ids | {"prompt": f"Who is {self.word}?", self.word: 1}, plain),
            (self._chat(temperature=3), chat),
            (ids | {"prompt": [*self.ids, 10**9]}, plain),
            (self._chat(model=self.word), chat),
            (self._chat(max_tokens=10**9), chat),
        ]

    def _headers(self, key: str | None = None) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key}", "content-type": "application/json"}

    def _post(self, client: httpx2.Client, body: object, path: str, key: str | None = None) -> int:
        return client.post(path, json=body, headers=self._headers(key)).status_code

    def _leave(self, client: httpx2.Client) -> None:
        """Goes away in the middle of an answer."""
        body = self._chat(stream=True, max_tokens=400, ignore_eos=True)
        with client.stream("POST", "/v1/chat/completions", json=body, headers=self._headers()) as response:
            next(response.iter_lines())

    def _call(self, target: str) -> None:
        key = (("authorization", f"Bearer {self.key}"),)
        message = pb.Message(role="user", content=f"Who is {self.word}?")
        sampling = pb.Sampling(max_tokens=4)
        with grpc.insecure_channel(target) as channel:
            stub = InferenceServiceStub(channel)
            ids = pb.TokenIds(ids=self.ids)
            assert list(
                stub.Chat(pb.ChatRequest(model="demo", messages=[message], sampling=sampling), _SECONDS, key)
            )
            assert list(
                stub.Generate(
                    pb.GenerateRequest(model="demo", token_ids=ids, sampling=sampling), _SECONDS, key
                )
            )
            stub.Tokenize(pb.TokenizeRequest(model="demo", text=self.word), _SECONDS, key)
            hot = pb.ChatRequest(model="demo", messages=[message], sampling=pb.Sampling(temperature=3))
            unknown = pb.ChatRequest(model=self.word, messages=[message])
            wrong = (("authorization", f"Bearer {self.wrong_key}"),)
            refused = [(hot, key), (unknown, key), (unknown, wrong)]
            codes = [_code(stub.Chat(request, _SECONDS, metadata)) for request, metadata in refused]
            assert codes == ["INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED"]
            bad = channel.unary_stream("/eightfold.v1.InferenceService/Chat")
            assert _code(bad(self.word.encode(), _SECONDS, key)) == "INVALID_ARGUMENT"
            endless = pb.Sampling(max_tokens=400, ignore_eos=True)
            call = stub.Chat(
                pb.ChatRequest(model="demo", messages=[message], sampling=endless), _SECONDS, key
            )
            next(call)
            call.cancel()


def _code(call: Any) -> str:
    try:
        list(call)
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"


def heard(songs: Mapping[str, str | bytes], texts: Mapping[str, bytes]) -> list[str]:
    """Where something was found that must not be: `what in where`."""
    wanted = {what: song.encode() if isinstance(song, str) else song for what, song in songs.items()}
    return [
        f"{what} in {where}" for where, text in texts.items() for what, song in wanted.items() if song in text
    ]


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder that can be read to its end."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # it has just been renamed
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@contextmanager
def everything_logged(path: Path) -> Iterator[None]:
    """Whatever this process logs goes to a file, down to the least, with arguments and stacks."""
    root, handler = logging.getLogger(), logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(args)s"))
    before = root.level
    # What this process uses as a client may log what it sends.
    handler.addFilter(lambda record: not record.name.startswith(("httpx2", "httpcore2", "openai")))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        handler.close()
