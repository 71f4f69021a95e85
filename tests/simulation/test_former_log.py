"""Private tensors that an earlier version wrote: read, verified, and replaced client by client."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedprompt.errors import DamagedFile
from fedprompt.files.tensors import CHECKSUM, checksum
from fedprompt.methods.base import Tensors
from fedprompt.simulation.private_log import PrivateLog
from tests.support.private_states import contents, same, state


def write_former(path: Path, states: dict[int, Tensors], *, checked: bool = True) -> None:
    """A file as it was written until rows had files of their own format."""
    clients = sorted(states)
    tensors = {"clients": torch.tensor(clients)}
    for name in states[clients[0]]:
        tensors[f"tensor/{name}"] = torch.stack([states[c][name] for c in clients])
    if not checked:
        path.write_bytes(save(tensors))
        return
    sums = [list(bytes.fromhex(checksum(states[c]))) for c in clients]
    tensors["sha256"] = torch.tensor(sums, dtype=torch.uint8)
    header = {CHECKSUM: checksum({n: tensors[n] for n in ("clients", "sha256")})}
    path.write_bytes(save(tensors, metadata=header))


def former_digest(*files: tuple[int, int, int]) -> str:
    """Round, rows and live rows of each file, as checkpoints of those versions hold them."""
    return hashlib.sha256(repr(list(files)).encode()).hexdigest()[:16]


@pytest.fixture
def log(tmp_path: Path) -> PrivateLog:
    """Two files; client 2 is in both."""
    log = PrivateLog(tmp_path / "private", 8)
    log.folder.mkdir()
    write_former(log._path(1), {c: state(c) for c in (1, 2, 3)})
    write_former(log._path(2), {c: state(10 + c) for c in (2, 4)})
    return log


DIGEST = former_digest((1, 3, 2), (2, 2, 2))


@pytest.mark.parametrize("checked", [True, False])
def test_states_are_read_and_replaced(log: PrivateLog, checked: bool) -> None:
    write_former(log._path(2), {c: state(10 + c) for c in (2, 4)}, checked=checked)
    log.restore(2, DIGEST)
    expected = {1: state(1), 2: state(12), 3: state(3), 4: state(14)}
    assert log.save(2) == DIGEST, "nothing was put"
    for server_round, client in ((3, 4), (4, 2), (5, 1)):
        expected[client] = state(20 + client)
        log.put(client, expected[client])
        digest = log.save(server_round)
        log.remove_stale()
        log = PrivateLog(log.folder, 8)
        log.restore(server_round, digest)
        for k in range(8):
            assert same(log.get(k), expected.get(k)), (server_round, k)
    assert not log._path(2).exists(), "both of its clients have newer states"
    assert log._path(1).exists()
    log.put(3, expected[3])
    log.save(6)
    log.remove_stale()
    assert not log._path(1).exists()


def test_a_crash_returns_to_the_former_states(log: PrivateLog) -> None:
    before = contents(log.folder)
    log.restore(2, DIGEST)
    log.put(4, state(9))
    log.save(3)
    log = PrivateLog(log.folder, 8)
    log.restore(2, DIGEST)
    assert same(log.get(4), state(14))
    assert contents(log.folder) == before


def test_a_run_without_private_tensors_has_the_former_digest(tmp_path: Path) -> None:
    log = PrivateLog(tmp_path / "private", 8)
    log.restore(3, former_digest())
    assert log.save(4) == former_digest()


def test_a_flipped_bit_is_one_line(log: PrivateLog) -> None:
    log.restore(2, DIGEST)
    content = bytearray(log._path(1).read_bytes())
    at = content.index(state(3)["theta"].numpy().tobytes())
    content[at] ^= 1
    log._path(1).write_bytes(bytes(content))
    assert same(log.get(1), state(1))
    with pytest.raises(DamagedFile, match=r"round-000001\.safetensors are damaged"):
        log.get(3)
