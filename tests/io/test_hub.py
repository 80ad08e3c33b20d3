"""Fetching from a hub, which is a local server that answers as the real one does."""

import base64
import hashlib
import http.server
import json
import threading

import numpy as np
import pytest

from qlora_jax.io import fetch, open_safetensors, write_safetensors
from qlora_jax.llm.app.pushing import push

SHA = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one repository's folder: its listing, and its files with their hashes."""

    folder = None
    gated = False
    asked: list = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        type(self).asked.append((self.path, None))
        path, files = self.path.split("?")[0], sorted(self.folder.iterdir())
        token = self.headers.get("Authorization", "")
        if self.gated and token != "Bearer let-me-in":
            return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if not path.removeprefix("/api/models").startswith(("/some/model", "/gpt2")):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if not path.startswith("/api"):
            data = (self.folder / path.rpartition("/")[2]).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}
            return self.answer(200, data, headers, body)
        listing = [self.listed(file) for file in files]
        if "/tree/" not in path:
            siblings = [{"rfilename": file.name} for file in files]
            listing = {"id": "some/model", "sha": SHA, "siblings": siblings}
        self.answer(200, json.dumps(listing).encode(), {}, body)

    def do_POST(self):
        """Accepts a push, as a single file or as lines of JSON."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path, messages = self.path, [json.loads(line) for line in body.splitlines()]
        type(self).asked.append((path, messages))
        status, reply, url = 200, {}, f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            status = 200 if messages[0]["name"] == "new" else 403
            reply = {"url": f"{url}/some/new"}
        if "/preupload/" in path:
            files = [{"path": x["path"]} for x in messages[0]["files"]]
            upload = {"uploadMode": "regular", "shouldIgnore": False}
            reply = {"files": [file | upload for file in files]}
        if "/commit/" in path:
            commit = f"{url}/some/new/commit/{SHA}"
            reply = {"commitUrl": commit, "commitOid": SHA, "success": True}
        self.answer(status, json.dumps(reply).encode(), {}, True)

    def listed(self, file):
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        entry = {"type": "file", "path": file.name, "oid": oid}
        return entry | {"size": file.stat().st_size}

    def answer(self, status, data, headers, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": np.ones(3)})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": np.ones(2)})
    weight_map = {
        x: f"model-0000{i}-of-00002.safetensors" for i, x in ((1, "a"), (2, "b"))
    }
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    for name in ("config.json", "spiece.model", "vocab.txt", "sentencepiece.bpe.model"):
        (folder / name).write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    (folder / "pytorch_model.bin").write_bytes(b"and again")
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://localhost:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(template, url + "/{repo_id}/resolve/{revision}/{filename}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_sharded_model_and_the_cache(hub, tmp_path):
    cache = tmp_path / "cache"
    folder = fetch("some/model", cache=cache)
    # Cached files are links to the repository's blobs, outside the snapshot folder.
    assert (folder / "config.json").is_symlink()
    assert sorted(open_safetensors(folder)) == ["a", "b"]
    left_out = {"consolidated.safetensors", "pytorch_model.bin"}

    def names(folder):
        return {file.name for file in folder.iterdir()}

    assert names(folder) == names(hub.folder) - left_out
    count = len(hub.asked)
    assert fetch("some/model", cache=cache, offline=True) == folder
    assert fetch("some/model", cache=cache, revision=SHA, offline=True) == folder
    assert len(hub.asked) == count


def test_an_id_may_have_one_part(hub, tmp_path):
    folder = fetch("gpt2", cache=tmp_path / "cache")
    assert sorted(open_safetensors(folder)) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="'gpt3'.*missing, and gpt3 could not"):
        fetch("gpt3", cache=tmp_path / "cache")
    num_asked = len(hub.asked)
    for file in ("model.gguf", "adapter.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"'{file}'. This path is missing."):
            fetch(file)
    assert len(hub.asked) == num_asked


def test_folders_and_files_are_pushed(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    (tmp_path / "a").write_text("one")
    (tmp_path / "adapter" / "b").mkdir(parents=True)
    (tmp_path / "adapter" / "b" / "c").write_bytes(b"\xff")
    for path in (None, tmp_path / "a", tmp_path / "adapter"):
        assert push("some/new", path).endswith("/some/new")
    created = [messages for path, messages in hub.asked if path == "/api/repos/create"]
    assert len(created) == 3 and all(x["visibility"] == "private" for [x] in created)
    commits = [messages for path, messages in hub.asked if "/commit/" in path]
    files = [x["value"] for messages in commits for x in messages if x["key"] == "file"]
    content = {x["path"]: base64.b64decode(x["content"]) for x in files}
    assert content == {"a": b"one", "b/c": b"\xff"}
    message = "`push_to_hub` must name a repository that can be written. some/other: "
    with pytest.raises(OSError, match=message):
        push("some/other")


def test_gated_models_need_a_token(hub, tmp_path):
    hub.gated = True
    message = "some/model is gated: accept its terms"
    with pytest.raises(FileNotFoundError, match=message):
        fetch("some/model", cache=tmp_path / "cache")
    folder = fetch("some/model", cache=tmp_path / "cache", token="let-me-in")
    assert (folder / "config.json").exists()


def test_what_cannot_be_fetched(hub, tmp_path):
    def get(*args, **kwargs):
        return fetch(*args, cache=tmp_path / "cache", **kwargs)

    with pytest.raises(FileNotFoundError, match="other/model could not be fetched"):
        get("other/model")
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        get("some/model", offline=True)
    for name in ("no/such/path", "/no/path", "../x", "a b/c", "word", "a/b.gguf", ""):
        with pytest.raises(FileNotFoundError, match="must be a path or a hub id"):
            get(name)
    for file in hub.folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="weights as safetensors"):
        get("some/model")


def test_revisions_of_paths_are_refused(tmp_path):
    assert fetch(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="`revision` must be left out .* Got 'v2'"):
        fetch(tmp_path, revision="v2")
