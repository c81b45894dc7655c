"""Adapter folders and a hub on loopback, for the tests of models' sources."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_adapter(folder: Path, *, peft_type: str = "LORA", scale: float = 1.0, **options: object) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": peft_type, "r": 4, "base_model_name_or_path": "org/backbone", **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"q.lora_A": torch.ones(4, 8) * scale, "q.lora_B": torch.ones(8, 4)}, folder / "adapter_model.safetensors"
    )
    return folder


@contextmanager
def hub_server(models: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as hub models under their ids, all at COMMIT; yield the endpoint and the files asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                self._answer_api(path.removeprefix("api/models/"))
            else:
                self._answer_file(path)

        do_HEAD = do_GET

        def _answer_api(self, path: str) -> None:
            name, _, rest = path.partition("/revision/")
            name, _, _ = name.partition("/tree/")
            if name not in models:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest not in ("", "main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = [path.name for path in sorted(models[name].iterdir())]
                siblings = [{"rfilename": file} for file in files]
                tree = [
                    {"type": "file", "path": file, "oid": "0" * 40, "size": (models[name] / file).stat().st_size}
                    for file in files
                ]
                info = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self._send(200, json.dumps(tree if "/tree/" in path else info).encode(), {})

        def _answer_file(self, path: str) -> None:
            name, _, rest = path.partition("/resolve/")
            file = rest.partition("/")[2]
            source = models.get(name, Path("/nonexistent")) / file
            if not source.is_file():
                code = "EntryNotFound" if name in models else "RepoNotFound"
                self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
                return
            if self.command == "GET":
                asked.append(file)
            block = source.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(block).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if asked_range := self.headers.get("Range"):
                first, _, last = asked_range.removeprefix("bytes=").partition("-")
                part = block[int(first) : int(last) + 1 if last else None]
                total = f"bytes {first}-{int(first) + len(part) - 1}/{len(block)}"
                self._send(206, part, {**headers, "Content-Range": total})
            else:
                self._send(200, block, headers)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
