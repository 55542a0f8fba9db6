"""A Hub on loopback: the download and upload calls of huggingface_hub, and faults on demand."""
import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union
from urllib.parse import unquote, urlsplit

__all__ = ['HUB', 'Fault', 'HubServer']

LARGE = ('.safetensors', '.bin', '.pth')  # kept by LFS, under their SHA-256; everything else by git, under its SHA-1


class Fault(NamedTuple):
    """What goes wrong with requests whose method and path match."""
    pattern: str  # regular expression for 'METHOD /path'
    kind: str  # HTTP status, with the Hub's name for the error if it has one; or 'cut', 'short', 'wrong', 'slow'
    times: float = float('inf')  # then it works


def etag(name: str, content: bytes) -> str:
    """Hash by which the Hub, and so the cache, names a file."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Repo:
    """Commits, each the files at that time, and the branches that point at them."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: Dict[str, Dict[str, bytes]] = {}
        self.branches: Dict[str, str] = {}
        self.commit({}, 'main')

    def commit(self, files: Dict[str, bytes], branch: str) -> str:
        files = {**self.files(branch), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


class HubServer:
    """The server, its repositories, and a log of the requests such as 'GET /org/name/resolve/main/config.json'."""

    def __init__(self) -> None:
        self.port = 0
        self.start()
        self.url = f'http://127.0.0.1:{self.port}'
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repos: Dict[str, Repo] = {}
        self.objects: Dict[str, bytes] = {}  # large files that are uploaded and wait for a commit
        self.faults: List[List[Any]] = []
        self.requests: List[str] = []

    def start(self) -> None:
        """Listen, after a stop on the same port as before."""
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), type('Handler', (Handler,), dict(hub=self)))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, **files: bytes) -> None:
        """Commit files; in their names '__' stands for '.'."""
        self.repos.setdefault(repo_id, Repo()).commit({k.replace('__', '.'): v for k, v in files.items()}, 'main')

    def fail(self, *fault: Any) -> None:
        """Misbehave as in Fault."""
        self.faults.append([Fault(*fault), 0])

    def next_fault(self, request: str) -> Optional[str]:
        """Kind of fault for this request."""
        for entry in self.faults:
            fault, count = entry
            if count < fault.times and re.search(fault.pattern, request):
                entry[1] += 1
                return fault.kind
        return None

    def count(self, pattern: str) -> int:
        """Requests so far that match."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request."""
    hub: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        length = self.headers.get('Content-Length')
        body = self.rfile.read(int(length)) if length else b''
        path = unquote(urlsplit(self.path).path)
        request = f'{self.command} {path}'
        self.hub.requests.append(request)
        fault = self.hub.next_fault(request)
        if fault and fault[0].isdigit():
            status, _, code = fault.partition(' ')
            return self.answer(int(status), {'error': 'on demand'}, **(dict(X_Error_Code=code) if code else {}))
        if fault == 'slow':
            threading.Event().wait(1.0)
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                return method(self, body, fault, *match.groups())
        self.answer(404, {'error': f'no such call: {request}'})

    do_HEAD = do_GET = do_POST = do_PUT = handle_one

    def answer(self, status: int, content: Union[bytes, dict], fault: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = len(body)
        if self.command == 'GET' and fault == 'wrong':
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif self.command == 'GET' and fault in ('cut', 'short'):  # the connection ends early; the length says less
            body = body[:-10]
            length = len(body) if fault == 'short' else length
        self.send_response(status)
        self.send_header('Content-Length', str(length))
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def find(self, repo_id: str, revision: str = 'main') -> Optional[Tuple[Repo, str]]:
        """Repository and commit; answers 404 if there is none."""
        repo = self.hub.repos.get(repo_id)
        sha = repo and repo.branches.get(revision, revision)
        if repo is None or sha not in repo.commits:
            self.answer(404, {}, X_Error_Code='RepoNotFound' if repo is None else 'RevisionNotFound')
            return None
        return repo, sha

    def resolve(self, body: bytes, fault: Any, repo_id: str, revision: str, name: str) -> None:
        found = self.find(repo_id, revision)
        if found is None:
            return
        content = found[0].files(found[1]).get(name)
        if content is None:
            return self.answer(404, {}, X_Error_Code='EntryNotFound', X_Repo_Commit=found[1])
        headers = dict(ETag=f'"{etag(name, content)}"', X_Repo_Commit=found[1])
        if name.endswith(LARGE):
            headers.update(X_Linked_Etag=headers['ETag'], X_Linked_Size=str(len(content)))
        self.answer(200, content, fault, **headers)

    def info(self, body: bytes, fault: Any, repo_id: str, revision: Optional[str] = None) -> None:
        found = self.find(repo_id, revision or 'main')
        if found is not None:
            files = [dict(rfilename=name) for name in found[0].files(found[1])]
            self.answer(200, dict(
                id=repo_id, modelId=repo_id, sha=found[1], siblings=files, private=found[0].private))

    def create(self, body: bytes, fault: Any) -> None:
        wish = json.loads(body)
        repo_id = f'{wish["organization"]}/{wish["name"]}'
        known = repo_id in self.hub.repos
        self.hub.repos.setdefault(repo_id, Repo(wish.get('visibility') == 'private' or wish.get('private', False)))
        self.answer(409 if known else 200, dict(url=f'{self.hub.url}/{repo_id}', name=repo_id))

    def branch(self, body: bytes, fault: Any, repo_id: str, name: str) -> None:
        found = self.find(repo_id)
        if found is not None:
            known = name in found[0].branches
            found[0].branches.setdefault(name, found[1])
            self.answer(409 if known else 200, {})

    def validate(self, body: bytes, fault: Any) -> None:
        self.answer(200, dict(errors=[], warnings=[]))

    def preupload(self, body: bytes, fault: Any, repo_id: str, revision: str) -> None:
        found = self.find(repo_id, revision)
        if found is not None:
            there = found[0].files(found[1])
            self.answer(200, dict(files=[
                dict(path=name, uploadMode='lfs' if name.endswith(LARGE) else 'regular', shouldIgnore=False,
                     oid=etag(name, there[name]) if name in there else None)
                for name in (file['path'] for file in json.loads(body)['files'])
            ]))

    def batch(self, body: bytes, fault: Any, repo_id: str) -> None:
        objects = json.loads(body)['objects']
        for o in objects:
            if o['oid'] not in self.hub.objects:
                o['actions'] = dict(upload=dict(href=f'{self.hub.url}/lfs/{o["oid"]}'))
        self.answer(200, dict(transfer='basic', objects=objects))

    def put(self, body: bytes, fault: Any, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.objects[oid] = body
        self.answer(200 if good else 400, {})

    def commit(self, body: bytes, fault: Any, repo_id: str, revision: str) -> None:
        found = self.find(repo_id, revision)
        if found is None:
            return
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.hub.objects[value['oid']]
        sha = found[0].commit(files, revision)
        self.answer(200, dict(commitUrl=f'{self.hub.url}/{repo_id}/commit/{sha}', commitOid=sha, success=True))


REPO = '([^/]+/[^/]+)'
ROUTES = [
    (f'(?:HEAD|GET) /{REPO}/resolve/([^/]+)/(.+)', Handler.resolve),
    (f'GET /api/models/{REPO}(?:/revision/([^/]+))?', Handler.info),
    ('POST /api/repos/create', Handler.create),
    ('POST /api/validate-yaml', Handler.validate),
    (f'POST /api/models/{REPO}/branch/([^/]+)', Handler.branch),
    (f'POST /api/models/{REPO}/preupload/(.+)', Handler.preupload),
    (rf'POST /{REPO}\.git/info/lfs/objects/batch', Handler.batch),
    ('PUT /lfs/([0-9a-f]{64})', Handler.put),
    (f'POST /api/models/{REPO}/commit/(.+)', Handler.commit),
]

# With these, no test reaches the network, or the cache and token of whoever runs it
HUB = HubServer()
HF_HOME = tempfile.TemporaryDirectory(prefix='hf-home-')
for key in [key for key in os.environ if key.startswith(('HF_', 'HUGGING'))] + ['TRANSFORMERS_OFFLINE']:
    os.environ.pop(key, None)
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME.name, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
