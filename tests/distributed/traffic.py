"""Count what processes send in a training step; torchrun starts this file with a dtype, copies and a folder.

Every rank leaves `RANK.json`: the bytes that it sent over TCP in a forward and in a backward pass, and the seconds of
the processor that both took. All ranks compute the same number of positions, whatever their number.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from transfuse.diffusion import DiffusionConfig, Process
from transfuse.model import ModelConfig, Transfusion
from transfuse.sequence import Document, Image, SequenceFormat, Text, collate
from transfuse.training import ObjectiveConfig, ParallelConfig, TransfusionObjective, join
from transfuse.training.distributed import local
from transfuse.training.parallel import parallelize

CONFIG = ModelConfig(
    d_model=192, n_layers=3, n_heads=3, d_ff=512, text_vocab_size=2000, max_seq_len=256, patch_size=2, latent_channels=4
)
SENT = slice(200, 208)  # tcpi_bytes_sent of Linux's tcp_info, a 64-bit number


def bytes_sent() -> int:
    """Return the bytes that this process's open TCP connections have sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    total += struct.unpack("q", copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[SENT])[0]
        except OSError:  # closed since it was listed
            continue
    return total


def main(dtype: str, replicate: str, folder: str) -> None:
    torch.set_num_threads(1)
    parallel = ParallelConfig(replicate=int(replicate))
    with join("cpu", parallel.replicate) as ranks:
        model = parallelize(Transfusion.on_meta(CONFIG, getattr(torch, dtype)), ranks, parallel).to_empty(device="cpu")
        for weight in model.parameters():
            local(weight.detach()).fill_(0.01)
        documents = [Document([Text((9,) * 40), Image(torch.zeros(4, 16, 16))], sample=i) for i in range(48)]
        objective = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0)
        batch = objective.sample_noise(collate(documents, SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)))
        readings = []
        for _ in range(2):  # in the first, connections are made
            marks = [bytes_sent()]
            began = time.process_time()
            loss = objective.loss(model, batch).losses.sum()
            marks.append(bytes_sent())
            loss.backward()
            took = time.process_time() - began
            if ranks.mesh is not None:
                dist.barrier()
            marks.append(bytes_sent())
            readings.append({"forward": marks[1] - marks[0], "backward": marks[2] - marks[1], "seconds": took})
            model.zero_grad()
        (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(readings[-1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
