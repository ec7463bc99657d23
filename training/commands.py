"""The commands about data and products: preview, estimate, merge, ... Heavy imports wait for their use."""

import argparse
import sys
from pathlib import Path
from typing import Any

from adapters import AdapterStore
from training.config import AdapterJob, OnError, PtConfig, Source, load_config
from training.errors import ConfigError
from training.templates import NAMES, named

Commands = Any
"""What argparse's add_subparsers returns."""

_TRUST = (
    "run the Python code that comes with the base model, which then can do whatever you can do (default: off)"
)


def add_to(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `python -m training`."""
    preview = commands.add_parser(
        "preview",
        parents=[shared],
        help="show rows as the model will see them, with the tokens that carry loss marked",
        description="Show what a job would learn from: rendered rows, the tokens that carry loss, what is cut. "
        "Trains nothing.",
    )
    preview.add_argument("config", type=Path, metavar="CONFIG.yaml")
    preview.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show (default: %(default)s)"
    )
    preview.set_defaults(command=_preview)

    estimate = commands.add_parser(
        "estimate",
        parents=[shared],
        help="say how much memory a job needs, and what would make it fit",
        description="Say how much memory a job needs, from the config.json of its base model alone: nothing is loaded "
        "or trained. Told beside it: what this machine has, and which settings would make the job fit.",
    )
    estimate.add_argument("config", type=Path, metavar="CONFIG.yaml")
    estimate.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    estimate.set_defaults(command=_estimate)

    convert = commands.add_parser(
        "convert-adapter",
        help="make an adapter of another tool, or of 2023 (.bin), one that can be published",
        description="Make an adapter of another tool, or of 2023, one that can be published. Pickles are read as "
        "tensors only: no code in them runs. Missing or foreign tensors are errors. SOURCE stays as it is.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="the old adapter's folder")
    convert.add_argument("target", type=Path, metavar="TARGET", help="a folder that does not exist yet")
    convert.add_argument(
        "--base",
        metavar="FOLDER|ID",
        help="check every name and shape against this base model, and tie the adapter to it",
    )
    convert.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="chats whose questions become golden prompts, so that servers can prove it; needs --base",
    )
    convert.add_argument(
        "--template", choices=NAMES, metavar="NAME", help=f"what it was trained with: {', '.join(NAMES)}"
    )
    convert.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave out this tensor or setting"
    )
    convert.set_defaults(command=_convert)

    merge = commands.add_parser(
        "merge",
        parents=[shared],
        help="add one or several adapters, in order, into a base model",
        description="Add one or several adapters, in order, into a base model, and write the full model. Needs about "
        "6 bytes of memory a parameter (50 GB for 8 billion). Order matters for modules trained in full and for chat "
        "templates: the last one stays. What was merged is recorded in xinglin_merge.json.",
    )
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="name, name@alias, name@revision or ./folder"
    )
    merge.add_argument(
        "--base", required=True, metavar="FOLDER|ID", help="the base model: what the adapters were trained on"
    )
    merge.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: models/<base>-<adapter>... in the data directory"
    )
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the base's own")
    merge.add_argument(
        "--any-base", action="store_true", help="merge adapters that were trained on another base, too"
    )
    merge.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    merge.set_defaults(command=_merge)

    export = commands.add_parser(
        "export",
        parents=[shared],
        help="write one adapter as a full model, or as a plain PEFT folder",
        description="Write one adapter for use elsewhere: merged into its base as a full model, or by itself as a "
        "plain PEFT folder.",
    )
    export.add_argument("adapter", metavar="ADAPTER", help="name, name@alias, name@revision or ./folder")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    kind = export.add_mutually_exclusive_group(required=True)
    kind.add_argument("--base", metavar="FOLDER|ID", help="the base model to merge it into")
    kind.add_argument("--adapter-only", action="store_true", help="adapter_config.json and tensors alone")
    export.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    export.set_defaults(command=_export)


def _preview(arguments: argparse.Namespace) -> None:
    from training.data import READERS  # noqa: PLC0415
    from training.models.base_model import find_base  # noqa: PLC0415
    from training.tokens.preview import preview, wants_colour  # noqa: PLC0415
    from training.tokens.vocabulary import add_tokens  # noqa: PLC0415

    config = load_config(arguments.config)
    if not isinstance(config, AdapterJob):
        raise ConfigError(
            f"{arguments.config}: stage {config.stage} makes its tokenizer itself: nothing to preview"
        )
    rows = READERS[config.reads](config.train_files, config.on_error, config.seed)
    reading = config if isinstance(config, PtConfig) else None
    must_chat = reading is None or not reading.makes_base or any("messages" in row for row in rows)
    base = find_base(config, AdapterStore(arguments.data_dir / "store"), must_chat=must_chat)
    if reading is not None:
        add_tokens(base.tokenizer, reading.new_tokens)
    lines = preview(
        rows,
        base.tokenizer,
        colour=wants_colour(sys.stdout),
        max_length=config.max_length,
        shown=arguments.rows,
        reads_on=reading is not None,
        packing=reading.packing if reading is not None else False,
    )
    for line in lines:
        print(line)


def _estimate(arguments: argparse.Namespace) -> None:
    from training.estimate.estimate import report  # noqa: PLC0415

    config = load_config(arguments.config)
    if not isinstance(config, AdapterJob):
        raise ConfigError(
            f"{arguments.config}: stage {config.stage} builds a small model: it needs little memory"
        )
    for line in report(config, AdapterStore(arguments.data_dir / "store"), arguments.device):
        print(line)


def _convert(arguments: argparse.Namespace) -> None:
    from training.artifacts.convert import convert_adapter  # noqa: PLC0415
    from training.data import read_chats  # noqa: PLC0415

    rows = None
    if arguments.golden is not None:
        rows = read_chats([Source(path=str(arguments.golden))], OnError())
    convert_adapter(
        arguments.source,
        arguments.target,
        base_model=arguments.base,
        drop=arguments.drop,
        chat_template=named(arguments.template) if arguments.template else None,
        golden_rows=rows,
    )


def _merge(arguments: argparse.Namespace) -> None:
    from training.artifacts.merge import merge  # noqa: PLC0415
    from training.models.base_model import base_name  # noqa: PLC0415

    store = AdapterStore(arguments.data_dir / "store")
    names = [base_name(arguments.base).rpartition("/")[2]]
    names += [Path(adapter).name.partition("@")[0] for adapter in arguments.adapters]
    out = arguments.out or arguments.data_dir / "models" / "-".join(names)
    merge(
        arguments.base,
        arguments.adapters,
        out,
        store,
        dtype=arguments.dtype,
        any_base=arguments.any_base,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(out)


def _export(arguments: argparse.Namespace) -> None:
    from training.artifacts.merge import export_adapter, merge  # noqa: PLC0415

    store = AdapterStore(arguments.data_dir / "store")
    if arguments.adapter_only and arguments.trust_remote_code:
        raise ConfigError("--trust-remote-code has no effect with --adapter-only, which needs no base model")
    if arguments.adapter_only:
        export_adapter(arguments.adapter, arguments.out, store)
    else:
        trust = arguments.trust_remote_code
        merge(arguments.base, [arguments.adapter], arguments.out, store, trust_remote_code=trust)
    print(arguments.out)
