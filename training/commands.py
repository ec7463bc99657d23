"""Commands for data and results: preview, estimate, merge, ... Heavy imports happen only when a command needs them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from adapters import AdapterStore
from training.config import AdapterJob, OnError, PtConfig, Source, load_config
from training.errors import ConfigError
from training.templates import NAMES, named

Commands = Any
"""The return type of argparse's add_subparsers."""

_TRUST = "run the Python code that comes with the base model, with your permissions (default: off)"


def add_to(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `python -m training`."""
    preview = commands.add_parser(
        "preview",
        parents=[shared],
        help="show rows as the model sees them, with loss tokens marked",
        description="Show the training data of a job without training: rendered rows, loss tokens, and what max_length "
        "cuts off.",
    )
    preview.add_argument("config", type=Path, metavar="CONFIG.yaml")
    preview.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show (default: %(default)s)"
    )
    preview.set_defaults(command=_preview)

    estimate = commands.add_parser(
        "estimate",
        parents=[shared],
        help="estimate the memory a job needs, and suggest settings that make it fit",
        description="Estimate the memory a job needs from the config.json of its base model, without loading or "
        "training. Also shows the memory of this machine and settings that would make the job fit.",
    )
    estimate.add_argument("config", type=Path, metavar="CONFIG.yaml")
    estimate.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    estimate.set_defaults(command=_estimate)

    convert = commands.add_parser(
        "convert-adapter",
        help="convert an adapter of another tool, or an old .bin adapter, so that it can be published",
        description="Convert an adapter of another tool, or an old .bin adapter, so that it can be published. Pickles "
        "are loaded as tensors only and run no code. Missing or unknown tensors are errors. SOURCE is not changed.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="folder of the adapter to convert")
    convert.add_argument("target", type=Path, metavar="TARGET", help="output folder; must not exist yet")
    convert.add_argument(
        "--base",
        metavar="FOLDER|ID",
        help="check all tensor names and shapes against this base model, and record it as the adapter's base",
    )
    convert.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="chats whose questions become golden prompts, so that servers can prove the adapter; needs --base",
    )
    convert.add_argument(
        "--template",
        choices=NAMES,
        metavar="NAME",
        help=f"prompt template of its training: {', '.join(NAMES)}",
    )
    convert.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="NAME",
        help="drop this tensor or setting; may be repeated",
    )
    convert.set_defaults(command=_convert)

    merge = commands.add_parser(
        "merge",
        parents=[shared],
        help="merge one or more adapters into a base model",
        description="Merge one or more adapters, in order, into a base model and write the full model. Needs about 6 "
        "bytes of memory per parameter (50 GB for 8 billion). Order matters for modules trained in full and for chat "
        "templates: the last one wins. xinglin_merge.json records the merged adapters.",
    )
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="name, name@alias, name@revision or ./folder"
    )
    merge.add_argument(
        "--base", required=True, metavar="FOLDER|ID", help="base model that the adapters were trained on"
    )
    merge.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: models/<base>-<adapter>... in the data directory"
    )
    merge.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the base model"
    )
    merge.add_argument(
        "--any-base", action="store_true", help="also merge adapters that were trained on another base"
    )
    merge.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    merge.set_defaults(command=_merge)

    export = commands.add_parser(
        "export",
        parents=[shared],
        help="export an adapter as a full model or as a plain PEFT folder",
        description="Export an adapter for other tools: merged into its base as a full model, or alone as a plain PEFT "
        "folder.",
    )
    export.add_argument("adapter", metavar="ADAPTER", help="name, name@alias, name@revision or ./folder")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    kind = export.add_mutually_exclusive_group(required=True)
    kind.add_argument("--base", metavar="FOLDER|ID", help="merge the adapter into this base model")
    kind.add_argument(
        "--adapter-only", action="store_true", help="write only adapter_config.json and the tensors"
    )
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
            f"{arguments.config}: stage {config.stage} has no tokenizer before training: nothing to preview"
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
            f"{arguments.config}: stage {config.stage} trains a small model: no estimate needed"
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
