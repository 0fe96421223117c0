"""The real client downloads from a server that fails in every way; a file is whole or not there."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from jaxchat.cli import data
from jaxchat.cli.main import main
from jaxchat.data.hub import client as hub
from jaxchat.data.hub.catalogue import DATASETS, parse_request, parse_requests
from jaxchat.data.hub.client import Stopped
from jaxchat.data.hub.download import Download
from jaxchat.data.manifest import Manifest
from jaxchat.data.text.folder import find_text
from jaxchat.errors import UserError
from tests.data.hub_server import LAST, REPO, SHARDS, TEXT, Fault, get

ROOT = Path(__file__).parents[2]


def assert_whole(folder: Path, *names: str) -> None:
    for name in names:
        assert (folder / "pretrain" / name).read_bytes() == SHARDS[name]
    assert not list(folder.glob(".download/**/*.part"))


def test_text_arrives_with_a_manifest_that_pins_the_validation_shard(server, tmp_path):
    download = get(tmp_path, f"{TEXT}:2")
    assert_whole(tmp_path, "shard_00000.parquet", "shard_00001.parquet", LAST)
    assert not (tmp_path / "pretrain" / "shard_00002.parquet").exists()
    assert download.bytes_done == download.bytes_total == sum(len(SHARDS[path.name]) for path in tmp_path.rglob("s*"))
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert data["datasets"][TEXT]["validation"] == f"pretrain/{LAST}"
    for name, record in data["files"].items():
        assert record["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    split = find_text(tmp_path)
    assert [path.name for path in split.val.files] == [LAST] and len(split.train.files) == 2
    # More shards later do not move it, and files that are there are not requested again.
    before = len(server.asked)
    get(tmp_path, f"{TEXT}:3")
    assert {path.rpartition("/")[2] for _, path, _ in server.asked[before:]} == {"shard_00002.parquet"}
    assert [path.name for path in find_text(tmp_path).val.files] == [LAST]


def test_the_validation_shard_is_pinned_whatever_its_name(server, tmp_path):
    """In nanochat it was whichever file came last in the folder."""
    get(tmp_path, f"{TEXT}:1")
    (tmp_path / "pretrain" / "zzz.parquet").write_bytes(SHARDS["shard_00002.parquet"])
    assert [path.name for path in find_text(tmp_path).val.files] == [LAST]
    (tmp_path / "pretrain" / LAST).unlink()
    with pytest.raises(
        UserError, match=f"{LAST}, which manifest.json names as the validation shard, is missing; 'jaxchat data"
    ):
        find_text(tmp_path)


def test_an_interrupted_file_resumes_where_it_stopped(server, tmp_path):
    name, said = "shard_00000.parquet", []
    server.faults[name].extend([Fault(first=50_000), Fault(first=0), Fault(first=30_000)])
    get(tmp_path, f"{TEXT}:1", said=said)
    assert_whole(tmp_path, name, LAST)
    assert [ranges for ranges in server.gets(f"/{name}") if ranges] == [
        "bytes=50000-", "bytes=50000-", "bytes=80000-"]  # fmt: skip
    assert len([line for line in said if name in line and "trying again" in line]) == 3


def test_a_server_without_ranges_starts_again(server, tmp_path):
    name = "shard_00000.parquet"
    server.faults[name].extend([Fault(first=50_000), Fault(whole=True)])
    download = get(tmp_path, f"{TEXT}:1")
    assert_whole(tmp_path, name, LAST)
    assert download.bytes_done == download.bytes_total


def test_silence_is_a_failure(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    name = "shard_00000.parquet"
    server.faults[name].append(Fault(first=20_000, stall=1.0))
    get(tmp_path, f"{TEXT}:1")
    assert_whole(tmp_path, name)
    assert server.gets(f"/{name}")[-1] == "bytes=20000-"


def test_wrong_bytes_are_discarded_and_downloaded_again(server, tmp_path):
    name, said = "shard_00000.parquet", []
    server.faults[name].extend([Fault(first=50_000), Fault(wrong=True)])
    download = get(tmp_path, f"{TEXT}:1", said=said)
    assert_whole(tmp_path, name)
    assert any(line.startswith(f"{name} arrived with the wrong bytes") for line in said)
    assert download.bytes_done == download.bytes_total


def test_a_server_that_sends_only_wrong_bytes_is_given_up(server, tmp_path):
    server.faults[LAST].extend(Fault(wrong=True) for _ in range(9))
    with pytest.raises(UserError, match=f"{LAST} arrived with the wrong bytes .* 3 times; nothing of it was kept"):
        get(tmp_path, f"{TEXT}:1")
    assert not (tmp_path / "pretrain" / LAST).exists() and f"pretrain/{LAST}" not in Manifest.read(tmp_path).files


def test_a_busy_server_is_waited_for(server, tmp_path, monkeypatch):
    name, said = "shard_00000.parquet", []
    server.early[name].extend([Fault(status=429, headers={"Retry-After": "0"}), Fault(status=503)])
    server.faults[name].extend([Fault(status=503, headers={"Retry-After": "0"}), Fault(first=9_000), Fault(status=500),
                                Fault(status=429, headers={"RateLimit": '"api";r=0;t=0'})])  # fmt: skip
    get(tmp_path, f"{TEXT}:1", said=said)
    assert_whole(tmp_path, name)
    assert [sum(f"answers {status} " in line for line in said) for status in (429, 503, 500)] == [2, 2, 1]


@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {"RateLimit": '"resolvers";r=0;t=7'}])
def test_the_wait_is_as_long_as_the_server_asks(server, tmp_path, headers):
    said = []
    server.faults[LAST].append(Fault(status=429, headers=headers))
    download = Download(tmp_path, parse_requests([f"{TEXT}:1"]), say=said.append)

    def watch(download):
        if said:
            download.stop()

    with pytest.raises(Stopped):
        download.run(watch, every=0.02)
    assert said == [f"{LAST}: the server answers 429 Too Many Requests; trying again in 7s"]


def test_a_server_that_asks_for_no_wait_still_gets_one(server, tmp_path):
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.faults[LAST].extend(Fault(status=503, headers={"Retry-After": after}) for after in ("0", past, "0"))
    began = time.monotonic()
    get(tmp_path, f"{TEXT}:1", backoff=0.2)
    assert time.monotonic() - began > 0.75 * (0.2 + 0.4 + 0.8)


def test_when_patience_ends_a_line_says_so_and_what_has_arrived_stays(server, tmp_path):
    server.faults[LAST].append(Fault(first=60_000))
    server.faults[LAST].extend(Fault(status=503) for _ in range(4))
    with pytest.raises(UserError, match=f"{LAST}: the server answers 503 .*4 times in a row; what has arrived is kept"):
        get(tmp_path, f"{TEXT}:1")
    get(tmp_path, f"{TEXT}:1")
    assert_whole(tmp_path, LAST)
    assert server.gets(f"/{LAST}")[-1] == "bytes=60000-"


@pytest.mark.parametrize(
    "status, expected",
    [(404, r"the server has no http\S+ \(404\); if HF_ENDPOINT is a mirror"), (403, "log in with 'hf auth login'"),
     (418, "the server answers 418 for http")],
)  # fmt: skip
def test_a_refusal_is_not_retried(server, tmp_path, status, expected):
    server.faults[LAST].extend(Fault(status=status) for _ in range(2))
    with pytest.raises(UserError, match=expected):
        get(tmp_path, f"{TEXT}:1")
    assert len(server.gets(f"/cdn/{hashlib.sha256(SHARDS[LAST]).hexdigest()}/{LAST}")) == 1


def test_no_server_and_no_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"{REPO}: no answer from 127.0.0.1: .*, 2 times in a row"):
        get(tmp_path, f"{TEXT}:1", patience=1)
    server.files[f"/api/datasets/{REPO}"] = b"<html>please log in</html>"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("tests.data.hub_server._Handler._listing", lambda self, *_: self._send(200, b"<html>"))
    with pytest.raises(UserError, match="does not respond like the hub .*; check HF_ENDPOINT"):
        get(tmp_path, f"{TEXT}:1")


def test_an_endpoint_without_its_scheme_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "foo")
    assert main(["data", "get", "arc", f"--folder={tmp_path}"]) == 2
    assert "HF_ENDPOINT is 'foo'; it must begin with http:// or https://" in capsys.readouterr().err


def test_a_full_disk_gives_a_line_and_the_rest_stays(server, tmp_path, monkeypatch):
    write = hub._write

    def full(file, piece):
        if file.tell() > 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, piece)

    monkeypatch.setattr(hub, "_write", full)
    with pytest.raises(UserError, match=r"no space left for .*\.part; free some"):
        get(tmp_path, f"{TEXT}:1")
    monkeypatch.setattr(hub, "_write", write)
    get(tmp_path, f"{TEXT}:1")
    assert_whole(tmp_path, LAST, "shard_00000.parquet")
    assert any(ranges for name in (LAST, "shard_00000.parquet") for ranges in server.gets(f"/{name}"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**8))
    with pytest.raises(UserError, match="needs about 0.2 GB more, and 0.1 GB are free"):
        get(tmp_path, f"{TEXT}:3")


def test_a_token_is_for_the_hub_alone(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get(tmp_path, f"{TEXT}:1")
    assert server.tokens and not [path for _, path in server.tokens if path.startswith("/cdn/")]


FAULTS = {
    "breaks off": lambda draw: Fault(first=draw.randrange(300_000)),
    "wrong bytes": lambda draw: Fault(wrong=True),
    "no range": lambda draw: Fault(whole=True),
    "429": lambda draw: Fault(status=429, headers={"Retry-After": "0"}),
    "503": lambda draw: Fault(status=503),
    "stopped": None,  # the download is stopped, and starts again
}


def download_through_faults(server, folder: Path, seed: int) -> Counter:
    """Downloads four files with a few random faults; returns how many of each kind there were."""
    draw, injected, waiting = random.Random(seed), Counter(), {}
    for name in (f"/{name}" for name in SHARDS):
        kinds = draw.sample(list(FAULTS) * 2, k=4)  # sending wrong bytes three times would be refused
        server.faults[name].extend(FAULTS[kind](draw) for kind in kinds if FAULTS[kind])
        server.early[name].extend(Fault(status=draw.choice([429, 503])) for _ in range(draw.randrange(2)))
        injected.update(kinds)
        waiting[name] = [kind for kind in kinds if FAULTS[kind]]
    server.seconds_per_piece = 0.001
    for _ in range(injected["stopped"]):
        download = Download(folder, parse_requests([f"{TEXT}:3"]), say=lambda line: None, backoff=0.001)
        limit = draw.randrange(1, 400_000)
        with contextlib.suppress(Stopped):
            download.run(lambda d, limit=limit: d.bytes_done > limit and d.stop(), every=0.005)
    get(folder, f"{TEXT}:3", backoff=0.001, patience=30)
    assert_whole(folder, *SHARDS)
    for name, kinds in waiting.items():
        injected.subtract(kinds[len(kinds) - len(server.faults[name]) :])  # the file was complete before these faults
    return injected


@pytest.mark.parametrize("seed", range(6))
def test_any_faults_in_any_order_end_with_all_files(server, tmp_path, seed):
    assert download_through_faults(server, tmp_path, seed).total() > 4


def test_stopping_and_resuming(server, tmp_path):
    server.seconds_per_piece = 0.02
    download = Download(tmp_path, parse_requests([f"{TEXT}:3"]), say=lambda line: None)
    with pytest.raises(Stopped):
        download.run(lambda download: download.bytes_done > 300_000 and download.stop(), every=0.01)
    server.seconds_per_piece = 0
    get(tmp_path, f"{TEXT}:3")
    assert_whole(tmp_path, *SHARDS)
    assert any(ranges for name in SHARDS for ranges in server.gets(f"/{name}"))


@pytest.mark.parametrize("name, code", [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 75), ("SIGHUP", 75)])
def test_a_command_that_was_stopped_resumes_where_it_was(server, tmp_path, name, code):
    """The command itself, in a separate process, with the environment variables that users set."""
    server.seconds_per_piece = 0.05
    command = [sys.executable, "-m", "jaxchat.cli.main", "data", "get", TEXT, "--shards", "3", "--folder", tmp_path]
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in tmp_path.rglob("*.part")) < 200_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and err.count(b"\n") == (code > 0), err
    server.seconds_per_piece = 0
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path} now has all of {TEXT}: 0.00" in done.stdout
    assert_whole(tmp_path, *SHARDS)
    assert any(ranges for name in SHARDS for ranges in server.gets(f"/{name}"))


def test_two_at_a_time_share_the_work(server, tmp_path):
    server.seconds_per_piece = 0.005
    said = []
    threads = [threading.Thread(target=get, args=(tmp_path, f"{TEXT}:3"), kwargs={"said": said}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(tmp_path, *SHARDS)
    assert [len(server.gets(f"/{name}")) for name in SHARDS] == [1] * 4
    assert said == [f"another process is downloading to {tmp_path}; waiting for it"]


def test_a_complete_folder_may_be_read_only(server, tmp_path, monkeypatch):
    get(tmp_path, f"{TEXT}:1")
    monkeypatch.setattr("jaxchat.data.hub.download.on_disk", None)  # every write uses it
    before = len(server.asked)
    get(tmp_path, f"{TEXT}:1")
    assert len(server.asked) == before


def test_a_data_set_named_twice_is_downloaded_once():
    assert parse_requests(["gsm8k", "gsm8k"]) == parse_requests(["gsm8k"])
    with pytest.raises(UserError, match="fineweb-edu is requested with several numbers of shards"):
        parse_requests(["fineweb-edu:1", "fineweb-edu:2"])


def test_offline_a_complete_folder_is_enough_and_missing_files_are_named(server, tmp_path, monkeypatch):
    get(tmp_path, f"{TEXT}:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.asked)
    get(tmp_path, f"{TEXT}:1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and .* lacks 1 of 3 files of fineweb-edu: pretrain/sh"):
        get(tmp_path, f"{TEXT}:2")
    assert len(server.asked) == before


def test_files_damaged_later_are_downloaded_again(server, tmp_path):
    names = ["shard_00000.parquet", "shard_00001.parquet", LAST]
    get(tmp_path, f"{TEXT}:2")
    cut, flipped, gone = (tmp_path / "pretrain" / name for name in names)
    cut.write_bytes(cut.read_bytes()[:-1000])
    data = bytearray(flipped.read_bytes())
    data[5000] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    get(tmp_path, f"{TEXT}:2")
    assert_whole(tmp_path, names[0], names[2])
    assert flipped.read_bytes() == data  # its size is right
    said = []
    get(tmp_path, f"{TEXT}:2", check_bytes=True, said=said)
    assert_whole(tmp_path, *names)
    assert f"pretrain/{names[1]} has different bytes from those that were downloaded; downloading it again" in said


def test_the_users_text_and_other_text_stay(server, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.txt").write_text("my text")
    with pytest.raises(UserError, match="contains text of your own, such as mine.txt; choose another folder"):
        get(own, f"{TEXT}:1")
    get(tmp_path / "a", f"{TEXT}:1")
    with pytest.raises(UserError, match="contains fineweb-edu; choose another folder for climbmix"):
        get(tmp_path / "a", "climbmix:1")
    other = tmp_path / "b" / "pretrain" / LAST
    other.parent.mkdir(parents=True)
    other.write_bytes(b"by somebody else")
    with pytest.raises(UserError, match=f"{LAST} was not downloaded and is left alone"):
        get(tmp_path / "b", f"{TEXT}:1")
    # The same bytes, put there by another program, are not downloaded.
    other.write_bytes(SHARDS[LAST])
    before = len(server.gets(LAST))
    get(tmp_path / "b", f"{TEXT}:1")
    assert len(server.gets(LAST)) == before
    assert_whole(tmp_path / "b", LAST, "shard_00000.parquet")


def test_a_damaged_manifest(server, tmp_path):
    for text, expected in [
        ("{", "is damaged"),
        ('{"version": 9}', "has version 9"),
        ('{"version": 1}', "is damaged"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            get(tmp_path, f"{TEXT}:1")


@pytest.mark.parametrize(
    "arguments, expected",
    {
        "climbmx": "unknown data set 'climbmx', did you mean 'climbmix'? There are: climbmix, fineweb-edu, smoltalk",
        "fineweb-edu --shards 0": "--shards is 0; it must be at least 1",
        "fineweb-edu:1823": "fineweb-edu has 1,822 shards for training; ask for 1 to 1,822, not 1,823",
        "fineweb-edu:x": "fineweb-edu:x: write fineweb-edu:SHARDS, such as fineweb-edu:50",
        "gsm8k:3": "gsm8k:3: gsm8k is not pretraining text and has no shards; write gsm8k",
        "gsm8k --shards 3": "gsm8k has no shards; leave --shards out",
        "climbmix fineweb-edu": "climbmix and fineweb-edu are both pretraining text; download each to a separate",
        "gsm8k --folder gs://bucket/data": "gs://bucket/data is not a local folder",
        "": "the following arguments are required: NAME",
    }.items(),
)
def test_bad_arguments(arguments, expected, capsys):
    assert main(["data", "get", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1


def test_without_a_terminal_lines_show_the_progress(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PLAIN_SECONDS", 0.0)
    server.seconds_per_piece = 0.02
    assert main(["data", "get", TEXT, "--shards", "1", "--folder", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^0.00\d+ of about 0.00\d+ GB, file \d of 2, \d+.\d MB/s, \ds left$", err, re.MULTILINE)
    assert out.startswith(f"{tmp_path} now has all of {TEXT}: 0.00")
    assert main(["data", "get", TEXT, "--shards", "1", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} already has all of {TEXT}\n"


def test_the_list_has_all_data_sets(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert all(dataset.name in out and dataset.license in out for dataset in DATASETS)
    assert "1,822 shards of 0.09 GB" in out


def test_the_default_number_of_shards():
    assert parse_request("fineweb-edu").shards == 8
