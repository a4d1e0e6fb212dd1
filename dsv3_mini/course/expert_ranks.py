"""Experts on real processes, for lesson 19: gloo ranks on this machine, each with its own tokens and its own experts.

The notebook writes what all of them start from into a folder, starts `python -m dsv3_mini.course.expert_ranks FOLDER`, which
starts the ranks, and reads what they wrote. Tensors go through safetensors; the ranks meet through a file in the same folder.
On Linux they part from one process that has imported all they need: a start costs seconds, and four of them four times that.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import UserError
from dsv3_mini.model.experts import GroupedExperts

PATIENCE = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class Outcome:
    """All ranks' results, put together in the order of the tokens and of the experts.

    out, and the gradients of sum(out * weight): of x, of the gates, and of both weights. sent: bytes of vectors that left each
    rank for another one, forward and backward, on each leg.
    """

    tensors: dict[str, Tensor]
    sent: list[list[int]]


def on_ranks(
    experts: GroupedExperts, inputs: Mapping[str, Tensor], counts: Sequence[int], layouts: Sequence[tuple[int, str]]
) -> list[Outcome]:
    """Run experts on len(counts) processes.

    Args:
        experts: whole, in FP32. inputs: x, chosen, gates and weight of all tokens.
        counts: how many of the tokens each rank has, in order.
        layouts: (nodes, dispatch) of each run; ranks lie evenly on nodes.

    Raises:
        UserError: a rank failed; with the last line of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="dsv3-ranks-") as name:
        folder = Path(name)
        plan = {
            "experts": len(experts.gate_up_proj),
            "inner": experts.down_proj.shape[-1],
            "counts": list(counts),
            "layouts": list(layouts),
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        weights = {key: weight.detach().contiguous() for key, weight in experts.named_parameters()}
        save_file(
            {**weights, **{key: tensor.contiguous() for key, tensor in inputs.items()}}, folder / "start.safetensors"
        )
        words = [sys.executable, "-m", "dsv3_mini.course.expert_ranks", str(folder)]
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        done = subprocess.run(words, env=alone, capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise UserError(f"a rank failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        return [_gather(folder, number, len(counts)) for number in range(len(layouts))]


def _gather(folder: Path, number: int, ranks: int) -> Outcome:
    parts = [load_file(folder / f"{number}-{rank}.safetensors") for rank in range(ranks)]
    sent = [part.pop("sent").tolist() for part in parts]
    return Outcome({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, sent)


# ---- one rank ----------------------------------------------------------------------------------------------------------


def start_ranks(folder: Path) -> None:
    """All ranks of the plan in `folder`, to their end."""
    plan = json.loads((folder / "plan.json").read_text())
    import torch._dynamo  # noqa: F401  what torch's exchange imports when it is first used
    import torch.multiprocessing

    import dsv3_mini.parallel.dispatch  # noqa: F401

    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(be_a_rank, (folder,), len(plan["counts"]), start_method=method)


def be_a_rank(rank: int, folder: Path) -> None:
    # Here, for the notebook itself needs nothing of it.
    from dsv3_mini.parallel.dispatch import dispatch
    from dsv3_mini.parallel.expert_parallel import ParallelExperts
    from dsv3_mini.parallel.traffic import row_bytes

    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text())
    start = load_file(folder / "start.safetensors")
    counts, ranks = plan["counts"], len(plan["counts"])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=ranks, timeout=PATIENCE)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    whole = _experts(plan, start)
    for number, (nodes, kind) in enumerate(plan["layouts"]):
        across, inside = _groups(nodes, ranks, rank)
        way = dispatch(kind).way(plan["experts"], across, inside, lambda: dist.group.WORLD)
        experts = ParallelExperts(whole, way)
        x, gates = (start[key][own].clone().requires_grad_() for key in ("x", "gates"))
        chosen = start["chosen"][own]
        out = experts(x, chosen, gates, chosen.flatten().bincount(minlength=plan["experts"]))
        (out * start["weight"][own]).sum().backward()
        there, back = row_bytes(x.shape[1], kind)
        sent = []
        for leg in way:  # once more, for the count of copies
            trip = leg.depart(chosen)
            chosen = trip.there(chosen)
            me = leg.group.rank()
            out_copies, in_copies = (sum(each) - each[me] for each in (trip.leaving, trip.arriving))
            sent.append(2 * (out_copies * there + in_copies * back))
        found = {"out": out.detach(), "x": x.grad, "gates": gates.grad, "sent": torch.tensor(sent)}
        found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / f"{number}-{rank}.safetensors")
    dist.destroy_process_group()


def _groups(nodes: int, ranks: int, rank: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's group across nodes, and inside its node; all ranks make all groups together."""
    places = ranks // nodes
    across = [dist.new_group([node * places + place for node in range(nodes)]) for place in range(places)]
    inside = [dist.new_group(list(range(node * places, (node + 1) * places))) for node in range(nodes)]
    return across[rank % places], inside[rank // places]


def _experts(plan: dict, start: Mapping[str, Tensor]) -> GroupedExperts:
    cfg = ModelConfig.preset(
        "nano", n_routed_experts=plan["experts"], hidden_size=start["x"].shape[1], moe_intermediate_size=plan["inner"]
    )
    experts = GroupedExperts(cfg)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(start[name])
    return experts


if __name__ == "__main__":
    start_ranks(Path(sys.argv[1]))
