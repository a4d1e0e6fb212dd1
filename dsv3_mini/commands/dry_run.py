"""dsv3 dry-run: a training step of any model on any number of GPUs, on this machine, without one of them."""

from __future__ import annotations

import argparse
import dataclasses
import json

from dsv3_mini.commands.flags import add_config, number, read_config, whole
from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.plan import ParallelPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, default="671b")
    parser.add_argument("--gpus", type=whole(1, most=2**17), default=2048, help="in all (default: 2048)")
    parser.add_argument(
        "--pp",
        type=whole(1, most=512),
        default=None,
        help="pipeline ranks (default: 16, or fewer where there are fewer GPUs)",
    )
    parser.add_argument(
        "--ep",
        type=whole(1, most=4096),
        default=None,
        help="ranks that share a layer's experts (default: 64, or fewer)",
    )
    parser.add_argument(
        "--ep-nodes", type=whole(1, most=512), default=None, help="nodes of an expert-parallel group (default: ep / 8)"
    )
    parser.add_argument("--dp-replicate", type=whole(1), default=1, help="copies of all weights (default: 1)")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=1, help="what data ranks share (default: 1)")
    parser.add_argument("--no-recompute", action="store_true", help="keep norms and up-projections for backward")
    parser.add_argument(
        "--schedule", default="DualPipeV", help="GPipe, 1F1B, interleaved, ZB1P, DualPipe or DualPipeV (default)"
    )
    parser.add_argument("--precision", choices=("fp8", "bf16"), default="fp8", help="of the products (default: fp8)")
    parser.add_argument("--batch", type=whole(1), default=None, help="sequences in a step (default: 15360, or near it)")
    parser.add_argument("--micro-batch", type=whole(1), default=1, help="sequences in a micro-batch (default: 1)")
    parser.add_argument(
        "--length", type=whole(1), default=None, help="tokens in a sequence (default: 4096, or the model's)"
    )
    machine = parser.add_argument_group("the machine (default: the report's H800)")
    for name, help in RATES.items():
        machine.add_argument(f"--{name}", type=number(0), default=None, metavar="N", help=help)
    parser.add_argument("--sweep", action="store_true", help="try layouts of so many GPUs, and list them by their time")
    parser.add_argument("--scaling", action="store_true", help="a table from 8 to 16,384 GPUs")
    parser.add_argument("--json", action="store_true", help="print JSON")


RATES = {
    "fp8": "TFLOP/s",
    "bf16": "TFLOP/s",
    "fp32": "TFLOP/s",
    "hbm": "GB/s of the GPU's memory",
    "nvlink": "GB/s inside a node",
    "ib": "GB/s between nodes, for each GPU",
    "memory": "GB of each GPU",
    "reserve": "GB of it that no tensor can have",
    "node": "GPUs of a node",
}
UNITS = {"fp8": 1e12, "bf16": 1e12, "fp32": 1e12, "node": 1}


def run(args: argparse.Namespace) -> int:
    # torch's parts for many ranks take seconds to load.
    from dsv3_mini.parallel.dry_run import Job, Machine, dry_run, scaling, sweep, table

    cfg = read_config(args)
    given = {name: getattr(args, name) * UNITS.get(name, 1e9) for name in RATES if getattr(args, name) is not None}
    machine = Machine(**({**given, "node": int(given["node"])} if "node" in given else given))
    length = args.length or min(4096, cfg.max_position_embeddings)
    common = dict(schedule=args.schedule, precision=args.precision, micro_batch=args.micro_batch, length=length)
    if args.scaling:
        found = scaling.scaling_table(cfg, machine, **common)
        print(
            json.dumps([dataclasses.asdict(row) for row in found], indent=2)
            if args.json
            else table.scaling_text(found, machine)
        )
    elif args.sweep:
        rows = sweep.sweep(cfg, args.gpus, machine, batch=args.batch, **common)
        print(json.dumps([row.to_dict() for row in rows], indent=2) if args.json else table.sweep_text(rows, machine))
    else:
        plan = read_plan(args, cfg, machine.node)
        batch = args.batch or sweep.near_batch(plan, args.micro_batch)
        result = dry_run(Job(cfg, plan, batch=batch, **common))
        print(json.dumps(table.to_dict(result, machine), indent=2) if args.json else table.text(result, machine))
    return 0


def read_plan(args: argparse.Namespace, cfg: ModelConfig, node: int) -> ParallelPlan:
    """The layout that the flags say; what they leave out is the report's, as far as there are GPUs and layers for it."""
    pp = args.pp or min(16, cfg.num_hidden_layers, args.gpus)
    while args.pp is None and args.gpus % pp:
        pp -= 1
    if args.gpus % (pp * args.dp_replicate):
        raise ConfigError(
            f"--gpus {args.gpus} must be a multiple of pp x dp_replicate ({pp} x {args.dp_replicate}): stages have as many ranks"
        )
    shard = args.gpus // (pp * args.dp_replicate)
    ep = args.ep or min(64, shard)
    while args.ep is None and (shard % ep or cfg.n_routed_experts % ep):
        ep -= 1
    nodes = args.ep_nodes or (ep // node if ep % node == 0 else 1)
    return ParallelPlan(pp=pp, dp_replicate=args.dp_replicate, dp_shard=shard, ep=ep, ep_nodes=nodes, zero=args.zero,
                        recompute=not args.no_recompute)  # fmt: skip
