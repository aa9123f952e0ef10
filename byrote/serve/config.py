"""What a server is: one frozen value that the command line fills and that crosses to the engine's process as JSON."""

import ipaddress
from dataclasses import dataclass, field

from byrote.engine.engine import EngineConfig
from byrote.errors import ConfigError
from byrote.model.quantize import check_weights

SHORTEST_KEY = 16  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one client may ask, and what all together may."""

    body_bytes: int = 1 << 20
    output_tokens: int = 4096  # a request for more is refused
    choices: int = 16  # n
    requests: int = 128  # under way at once; more are answered with 429
    request_s: float = 600.0  # wall clock of one request

    def __post_init__(self) -> None:
        for name in ("body_bytes", "output_tokens", "choices", "requests", "request_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"limits.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    run: str  # folder of the model
    name: str  # what clients call it
    device: str = "auto"
    weights: str = "saved"  # or "int8", on the CPU
    memories: tuple[tuple[str, str], ...] = ()  # (name, folder) of the packs that requests may ask for
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    open_to_all: bool = False  # bind elsewhere than to this machine although there is no key
    drain_s: float = 30.0  # how long requests under way may go on after SIGTERM
    restarts: int = 3  # deaths of the engine's process within ten minutes that are made good; one more ends the server
    limits: Limits = field(default_factory=Limits)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; allowed: 0 (any that is free) to 65535")
        short = [key for key in self.keys if len(key) < SHORTEST_KEY]
        if short:
            raise ConfigError(
                f"an API key has {len(short[0])} characters; use at least {SHORTEST_KEY}, such as `openssl rand -hex 16` prints"
            )
        if not (self.keys or self.open_to_all or is_this_machine(self.host)):
            raise ConfigError(
                f"--host {self.host} lets other machines in, and no API key is set: give --api-key-file FILE (or BYROTE_API_KEY), "
                "or say --open-to-all if everybody who can reach this port may use it"
            )
        check_weights(self.weights, self.device)
        self._check_memories()

    def _check_memories(self) -> None:
        names = [name for name, _ in self.memories]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ConfigError(f"--memory names {double[0]!r} twice; write --memory NAME=FOLDER with another name for one of them")
        odd = [name for name in names if not name or not all(part.isalnum() or part in "-_." for part in name)]
        if odd:
            raise ConfigError(f"--memory has the name {odd[0]!r}; letters, digits, '-', '_' and '.' may stand in one")


def is_this_machine(host: str) -> bool:
    """Whether only programs on this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
