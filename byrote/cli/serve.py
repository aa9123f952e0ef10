"""`byrote serve RUN`: an OpenAI-compatible server and a chat page for one run, and its memory packs."""

import argparse
import os
from pathlib import Path

from byrote.cli.loading import add_weights
from byrote.errors import ConfigError

HELP = "serve a run: OpenAI-compatible HTTP API and a chat page"

EXAMPLES = """
examples:
  byrote serve runs/quickstart                              http://127.0.0.1:8000, for this machine alone
  byrote serve runs/base --memory law=packs/law --memory med=packs/med      models base, base:law and base:med
  BYROTE_API_KEY=$(openssl rand -hex 16) byrote serve runs/base --host 0.0.0.0

Clients send the key as 'Authorization: Bearer KEY'. SIGTERM ends the server when the requests under way are done (at most --drain
seconds). If the engine's process dies, its requests end with an error and a new one is started; after the fourth death in ten minutes the
server exits with status 3.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="folder made by `byrote train`, `byrote quickstart` or `byrote import`")
    parser.add_argument(
        "--memory", action="append", default=[], metavar="[NAME=]PACK", help="a memory pack; clients ask for it as RUN:NAME"
    )
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    parser.add_argument("--api-key-file", metavar="FILE", help="one key a line; or set BYROTE_API_KEY")
    parser.add_argument("--open-to-all", action="store_true", help="listen elsewhere than on this machine without a key")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add_weights(parser)
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="sequences decoded at once (default: %(default)s)")
    parser.add_argument(
        "--cache-tokens", type=int, default=65_536, metavar="N", help="tokens that all caches hold together (default: %(default)s)"
    )
    parser.add_argument(
        "--max-requests", type=int, default=128, metavar="N", help="requests under way; more get 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-output", type=int, default=4096, metavar="N", help="most tokens a request may ask for (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (default: %(default)s)")
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="seconds left to requests under way after SIGTERM (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from byrote.serve.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"`byrote serve` needs {error.name}, which is not installed: pip install 'byrote[serve]'") from None
    from byrote.engine.engine import EngineConfig
    from byrote.serve.config import Limits, ServeConfig

    config = ServeConfig(
        run=args.run,
        name=args.name or Path(args.run).resolve().name,
        device=args.device,
        weights=args.weights,
        memories=tuple(_named(given) for given in args.memory),
        host=args.host,
        port=args.port,
        keys=_keys(args.api_key_file),
        open_to_all=args.open_to_all,
        drain_s=args.drain,
        limits=Limits(output_tokens=args.max_output, requests=args.max_requests, request_s=args.timeout),
        engine=EngineConfig(max_batch=args.max_batch, cache_tokens=args.cache_tokens),
    )
    return serve(config)


def _named(given: str) -> tuple[str, str]:
    """(name, folder) of NAME=FOLDER, or of FOLDER alone, whose own name then counts."""
    name, equals, folder = given.partition("=")
    return (name, folder) if equals else (Path(given).resolve().name, given)


def _keys(file: str | None) -> tuple[str, ...]:
    if file is None:
        key = os.environ.get("BYROTE_API_KEY", "")
        return (key,) if key else ()
    try:
        keys = tuple(line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys in {file}: {error}") from None
    if not keys:
        raise ConfigError(f"{file} holds no key; write one a line")
    return keys
