"""The structures of index.h, latent_index.h and window.h."""

from ctypes import Structure, c_float, c_long, c_void_p

from byrote.kernels.decode_step.cpu import MOST_ROWS, Kept


class Chooser(Structure):
    """`chooser` of index.h."""

    _fields_ = (
        *((name, c_long) for name in ("heads", "width", "top_k")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("queries", "weights")),
        ("keys", Kept),
        *((name, c_void_p) for name in ("scores", "left", "chosen")),
        ("room", c_long),
        *((name, c_long * MOST_ROWS) for name in ("first", "end")),
    )


class LatentIndex(Structure):
    """`latent_index` of latent_index.h."""

    _fields_ = (("index", Chooser), *((name, c_void_p) for name in ("queries", "gain", "bias", "places")), ("hadamard", c_long))


class Pool(Structure):
    """`pool` of window.h."""

    _fields_ = (
        *((name, c_long) for name in ("width", "channels")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("values", "gates", "bias", "gain")),
        *((name, Kept) for name in ("open", "entries")),
        ("counts", c_void_p),
    )


class Window(Structure):
    """`window_block` of window.h."""

    _fields_ = (
        ("index", Chooser),
        *((name, c_long) for name in ("heads", "width", "rope", "window", "ratio", "overlaps", "pools")),
        *((name, c_float) for name in ("scale", "eps", "turn_scale")),
        *((name, c_void_p) for name in ("frequencies", "turn", "sink", "gain", "queries", "index_queries")),
        ("near", Kept),
        ("places", c_void_p),
        ("pool", Pool * 2),
    )
