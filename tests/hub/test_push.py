"""Publishing: one commit with all files, or an error after which nothing is published."""
import pytest
from hub_helpers import WEIGHTS, assert_same_logits, create, trained
from huggingface_hub import constants

import timm_rla_cli as cli

DESTINATION = 'someone/rla-digits'
NAMES = {'README.md', 'config.json', 'curves.png', WEIGHTS}


@pytest.fixture(params=['lfs', 'xet'])
def client(request, hub, monkeypatch):
    """With and without hf_xet, which the client takes for the upload of folders too; no file here is for Xet."""
    if request.param == 'xet':
        pytest.importorskip('hf_xet')
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
        monkeypatch.setattr('hub_server.LARGE', ())
    return hub


def push(run, *options):
    return ['push', str(run / 'last.pth.tar'), DESTINATION, *options]


def test_push_and_load(client, runs, tmp_path, capsys):
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    repo = client.repos[DESTINATION]
    assert capsys.readouterr().out.splitlines()[-1] == f'{client.url}/{DESTINATION}/commit/{repo.branches["main"]}'
    assert repo.files().keys() == NAMES and len(repo.commits) == 2  # the empty one, and one with all of it
    assert_same_logits(create(tmp_path, f'hf-hub:{DESTINATION}'), trained(runs.plain / 'last.pth.tar'), 8)
    card = repo.files()['README.md'].decode()
    assert f"'hf-hub:{DESTINATION}'" in card and '# rla-digits' in card


def test_push_again(client, runs):
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    first = dict(client.repos[DESTINATION].commits)
    client.requests.clear()
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    assert client.repos[DESTINATION].commits == first
    assert not client.count('^PUT|/commit/')
    assert cli.main(push(runs.ema, '--token', 'hf_x')) == 0  # other weights
    assert len(client.repos[DESTINATION].commits) == len(first) + 1


def test_push_to_a_branch(client, runs, tmp_path):
    for trained_run in (runs.plain, runs.ema):  # made by the first, there for the second
        assert cli.main(push(trained_run, '--token', 'hf_x', '--revision', 'v2')) == 0
    repo = client.repos[DESTINATION]
    assert repo.files('v2').keys() >= NAMES and not repo.files('main')
    assert_same_logits(create(tmp_path, f'hf-hub:{DESTINATION}@v2'), trained(runs.ema / 'last.pth.tar'), 8)


def test_push_to_a_pull_request_that_is_there(client, runs):
    """Which is no branch that could be made."""
    client.add(DESTINATION)
    client.repos[DESTINATION].branches['refs/pr/1'] = client.repos[DESTINATION].branches['main']
    assert cli.main(push(runs.plain, '--token', 'hf_x', '--revision', 'refs/pr/1')) == 0
    assert not client.count('/branch/') and client.repos[DESTINATION].files('refs/pr/1').keys() >= NAMES


def test_private(client, runs, fails):
    """What should be private never goes into a repository that is public."""
    assert cli.main(push(runs.plain, '--token', 'hf_x', '--private')) == 0
    assert client.repos[DESTINATION].private and client.repos[DESTINATION].files().keys() == NAMES
    client.add('someone/open')
    line = fails('push', runs.plain / 'last.pth.tar', 'someone/open', '--token', 'hf_x', '--private')
    assert '--private: someone/open is there, and public' in line and not client.repos['someone/open'].files()


def test_dry_run(hub, runs, capsys):
    assert cli.main(push(runs.plain, '--dry-run')) == 0
    out = capsys.readouterr().out
    assert not hub.requests and not hub.repos
    assert all(name in out for name in NAMES) and f'# {DESTINATION.split("/")[1]}' in out


@pytest.mark.parametrize('pattern, status, words', [
    ('POST /api/repos/create', '401', '401'),
    ('POST /api/repos/create', '403', '403'),
    ('POST .*/preupload/', '500', '500'),
    ('POST .*/preupload/', '401 RepoNotFound', 'authenticated'),
    ('PUT /lfs/', '500', WEIGHTS),
    ('POST .*/commit/', '500', '500'),
    ('POST .*/commit/', '403', '403'),
], ids=lambda value: value.replace('POST ', ''))
def test_push_that_fails(client, runs, fails, pattern, status, words):
    if 'lfs' in pattern and not constants.HF_HUB_DISABLE_XET:
        pytest.skip('no file is large there')
    client.fail(pattern, status)
    line = fails(*push(runs.plain, '--token', 'hf_x'))
    assert DESTINATION in line and 'nothing was published' in line and words in line
    assert DESTINATION not in client.repos or not client.repos[DESTINATION].files()
    client.faults.clear()
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    assert client.repos[DESTINATION].files().keys() == NAMES


def test_push_with_the_server_gone(client, runs, fails, gone):
    gone()
    assert 'nothing was published' in fails(*push(runs.plain, '--token', 'hf_x'))


def test_push_in_offline_mode(hub, runs, fails, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'offline mode' in fails(*push(runs.plain, '--token', 'hf_x'))
    assert not hub.requests


@pytest.mark.parametrize('repo_id', ['a/b/c', 'a b/c', 'a/..', 'a/b.git', 'digits'])
@pytest.mark.parametrize('options', [['--token', 'hf_x'], ['--dry-run']])
def test_push_to_a_bad_name(hub, runs, fails, repo_id, options):
    assert repo_id in fails('push', runs.plain / 'last.pth.tar', repo_id, *options)
    assert not hub.repos


def test_push_of_no_checkpoint(hub, tmp_path, fails):
    assert 'no such file' in fails('push', tmp_path / 'no.pth', DESTINATION)
    assert not hub.requests
