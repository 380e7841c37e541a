"""The library's modules as graphs of gates: what the analytical model counts (docs/cost.md).

Each function is the SystemVerilog module of its name, with the same parameters by the same names, and says the same in
the same order; the tests run both the units and the reference. Words come and go as lists of bits, the lowest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lnsdeploy.cost.graph import Bits, Graph, constant, signed, unsigned
from lnsdeploy.rtl.roms import ROM_CONSTANTS, ROM_ENCODER, Adder, Rom

Values = Mapping[str, int]


def _rom(roms: Sequence[Rom], ident: int) -> Rom:
    return next(rom for rom in roms if rom.id == ident)


def _read(g: Graph, rom: Rom, address: Sequence[int]) -> Bits:
    return g.look_up(unsigned(address, rom.address_bits), rom.entries, rom.data_bits)


def _past(g: Graph, d: Sequence[int], minus: int, plus_end: int, minus_end: int) -> int:
    """Whether d is at or past the end of its table."""
    bits = len(d)
    ends = [g.at_least(d, constant(end, bits)) if end < 1 << bits else 0 for end in (minus_end, plus_end)]
    return g.mux(minus, *ends)


# ---------------------------------------------------------------------------------------------------
# Words


def multiplier(g: Graph, v: Values, a: Bits, w: Bits) -> tuple[int, int, Bits]:
    """lns_mul: sign, zero, code."""
    codes, signs = [], []
    for word, name in ((a, "A"), (w, "W")):
        cut = v[f"{name}_BITS"] - v[f"{name}_SIGNED"]
        codes.append(word[:cut])
        signs.append(word[-1] if v[f"{name}_SIGNED"] else 0)
    zero = g.or_(g.any_(codes[0]) ^ 1, g.any_(codes[1]) ^ 1)
    bits = v["P_BITS"]
    scaled = []
    for code, scale in zip(codes, (v["A_SCALE"], v["W_SCALE"]), strict=True):
        wide = unsigned(code, bits)
        scaled.append(wide if scale == 1 else g.multiply(wide, constant(scale, scale.bit_length()), bits))
    return g.xor(*signs), zero, g.add(scaled[0], scaled[1])


def normalize(g: Graph, word: Bits) -> tuple[Bits, Bits]:
    """lns_normalize: the word with its leading one on top, and the place where that was."""
    n = len(word)
    if n == 1:
        return word, [0]
    steps = (n - 1).bit_length()
    zeros: Bits = []
    for i in range(steps):
        shift = 1 << (steps - 1 - i)
        none = g.any_(word[n - shift :]) ^ 1
        word = g.choose(none, [0] * shift + word[: n - shift], word)
        zeros.insert(0, none)
    return word, g.sub(constant(n - 1, steps), zeros)


def fraction(g: Graph, rom: Rom, word: Bits, code_bits: int) -> Bits:
    """lns_fraction: the code of a significand's fraction, by its segment and a comparison."""
    low_bits = len(word) - rom.address_bits
    entry = _read(g, rom, word[low_bits:])
    code = unsigned(entry[low_bits + 1 :], code_bits)
    if low_bits <= 0:
        return code
    above = g.at_least([*word[:low_bits], 0], entry[: low_bits + 1])
    return g.add(code, unsigned([above], code_bits))


def output(g: Graph, v: Values, code: Bits, sign: int, zero: int) -> Bits:
    """lns_output: the word of a signed code."""
    magnitude = v["OUT_BITS"] - v["OUT_SIGNED"]
    code = signed(code, max(len(code), magnitude + 2))
    zero = zero if v["OUT_SIGNED"] else g.or_(zero, sign)
    under = g.less(code, constant(1, len(code)))
    over = g.less(constant((1 << magnitude) - 1, len(code)), code)
    none = g.or_(zero, under)
    limited = g.choose(none, constant(v["UNDERFLOW"], magnitude), [g.or_(over, bit) for bit in code[:magnitude]])
    if not v["OUT_SIGNED"]:
        return limited
    return [*limited, g.all_([sign, zero ^ 1, g.any_(limited)])]


# ---------------------------------------------------------------------------------------------------
# Linear accumulation


def term(g: Graph, v: Values, roms: Sequence[Rom], code: Bits, zero: int, align: int) -> tuple[Bits, Bits]:
    """lns_term with a constant alignment: magnitude, bin."""
    f, table, bits = v["F"], v["TABLE_BITS"], v["TERM_BITS"]
    low = f - table
    padded = unsigned(code, v["P_BITS"] + f + 1)
    quotient = padded[f : f + max(v["P_BITS"] - f, 1)]
    mitchell = [*padded[:low], *[0] * table, 1] if low else [1]
    mantissa = mitchell
    if not v["CONVERSION"]:
        entry = _read(g, _rom(roms, ROM_CONSTANTS), padded[low : low + table])
        mantissa = g.multiply(entry, mitchell, len(entry) + len(mitchell)) if low else entry
    full = max(len(mantissa) + (1 << len(quotient)), bits + max(align, 0))
    word = g.shift_left(unsigned(mantissa, full), quotient)
    if v["SHIFT"] and align > 0:
        word = g.add(word, constant(1 << (align - 1), full))
    word = word[align:] if align > 0 else [0] * -align + word
    return g.masked(unsigned(word, bits), zero ^ 1), padded[low : low + table] or [0]


def fit(g: Graph, word: Bits, bits: int, saturate: int) -> Bits:
    """lns_fit."""
    word = signed(word, max(len(word), bits) + 1)
    if not saturate:
        return word[:bits]
    wide, limit = len(word), (1 << (bits - 1)) - 1
    over = g.less(constant(limit, wide), word)
    under = g.less(word, constant(-limit, wide))
    within = g.choose(under, constant(-limit, bits), word[:bits])
    return g.choose(over, constant(limit, bits), within)


def step_bin(g: Graph, v: Values, terms: Sequence[tuple[Bits, int]], here: Sequence[int], acc: Bits) -> Bits:
    """One bin of lns_lin_step: an accumulator after the terms (magnitude, sign) of a step that are `here`."""
    words = []
    for (magnitude, sign), on in zip(terms, here, strict=True):
        word = [*magnitude, 0]
        words.append(g.masked(g.choose(sign, g.neg(word), word), on))
    # lns_sum, which synthesis makes one sum of
    total_bits = v["TERM_BITS"] + 1 + (len(terms) - 1).bit_length()
    total = g.compress([signed(word, total_bits) for word in words], total_bits) if len(words) > 1 else words[0]
    step = fit(g, total, v["PSUM_BITS"], v["OVERFLOW"])
    wide = max(v["PSUM_BITS"], v["ACC_BITS"]) + 1
    return fit(g, g.add(signed(acc, wide), signed(step, wide)), v["ACC_BITS"], v["OVERFLOW"])


def equals(g: Graph, word: Sequence[int], value: int) -> int:
    """word == value."""
    return g.all_([bit if value >> i & 1 else bit ^ 1 for i, bit in enumerate(word)])


def linear_finish(g: Graph, v: Values, roms: Sequence[Rom], bins: Sequence[Bits], offset: Bits) -> Bits:
    """lns_lin_finish with lns_combine and lns_lin_to_log: the word of an accumulator's bins."""
    total_bits, f = v["TOTAL_BITS"], v["F"]
    if v["CONVERSION"]:
        constants = _rom(roms, ROM_CONSTANTS)
        rows: list[Bits] = []
        for index, word in enumerate(bins):
            factor = constants.entries[index] if index < len(constants.entries) else 0
            rows += g.products(signed(word, total_bits), constant(factor, constants.data_bits))
        # products and their sum, which synthesis makes one sum of
        total = g.compress(rows, total_bits)
    else:
        total = signed(bins[0], total_bits)
    magnitude = g.choose(total[-1], g.neg(total), total)
    normalized, position = normalize(g, magnitude)
    index_bits = v["ENCODER_BITS"]
    width = total_bits - 1 if total_bits - 1 > index_bits else max(index_bits, 1)
    rest = [0] * (width - (total_bits - 1)) + normalized[: total_bits - 1]
    if v["ENCODER"] == 0:
        code = fraction(g, _rom(roms, ROM_ENCODER), rest, f + 1)
    elif v["ENCODER"] == 1:
        code = _read(g, _rom(roms, ROM_ENCODER), rest[width - index_bits :])
    else:
        code = [*rest[width - f :], 0] if f else [0]
    raw_bits = total_bits.bit_length() + f + 1
    raw = g.add(unsigned([0] * f + position, raw_bits), unsigned(code, raw_bits))
    wide = max(raw_bits + 1, v["OFFSET_BITS"]) + 1
    moved = g.add(unsigned(raw, wide), signed(offset, wide))
    return output(g, v, moved, total[-1], g.any_(magnitude) ^ 1)


# ---------------------------------------------------------------------------------------------------
# Log accumulation


def enter(g: Graph, v: Values, code: Bits, zero: int, scale: Bits) -> Bits:
    """lns_enter."""
    guard, bits = v["GUARD"], v["ACC_BITS"]
    wide = max(max(len(code), len(scale)) + guard, bits) + 3
    scaled = [0] * guard + g.add(unsigned(code, wide), signed(scale, wide))[: wide - guard]
    none = g.or_(zero, g.less(scaled, constant(1, wide)))
    over = g.less(constant((1 << bits) - 1, wide), scaled)
    return [g.and_(none ^ 1, g.or_(over, bit)) for bit in scaled[:bits]]


def adder(g: Graph, made: Adder, x: tuple[int, Bits], y: tuple[int, Bits], plus: Sequence[int]) -> tuple[int, Bits]:
    """lns_add: sign and code of two of them.

    Args:
        plus: Δ⁺ by the emulator, which some methods without tables are counted by.
    """
    (x_sign, x_code), (y_sign, y_code) = x, y
    bits = len(x_code)
    larger = g.at_least(x_code, y_code)
    upper, lower = g.choose(larger, x_code, y_code), g.choose(larger, y_code, x_code)
    d = g.sub(upper, lower)
    differ = g.xor(x_sign, y_sign)
    with g.part("tables"):
        delta = DELTAS[made.module](g, made, d, differ, plus)
    wide = max(bits, made.value_bits) + 2
    base, change = unsigned(upper, wide), unsigned(delta, wide)
    total = g.choose(differ, g.sub(base, change), g.add(base, change))
    if made.module == "none":
        # without Δ no sum leaves the range, and two words are equal bit by bit
        differs = g.any_([g.xor(a, b) for a, b in zip(x_code, y_code, strict=True)])
        code = g.masked(upper, g.or_(differ ^ 1, differs))
    else:
        none = g.or_(g.and_(differ, g.any_(d) ^ 1), g.less(total, constant(1, wide)))
        over = g.less(constant((1 << bits) - 1, wide), total)
        code = [g.and_(none ^ 1, g.or_(over, bit)) for bit in total[:bits]]
    code = g.choose(g.any_(lower), code, upper)
    return g.and_(g.mux(larger, x_sign, y_sign), g.any_(code)), code


def log_finish(g: Graph, v: Values, sign: int, code: Bits, offset: Bits) -> Bits:
    """lns_log_finish."""
    guard, bits = v["GUARD"], v["ACC_BITS"]
    rounded = g.add([*code, 0], constant((1 << guard) >> 1, bits + 1))[guard:]
    wide = max(bits + 2, v["OFFSET_BITS"]) + 1
    moved = g.add(unsigned(rounded, wide), signed(offset, wide))
    return output(g, v, moved, sign, g.any_(code) ^ 1)


# ---------------------------------------------------------------------------------------------------
# Gaussian logarithms: each lns_delta_*


def _integers(made: Adder) -> dict[str, int]:
    return {name: int(str(value).split("d")[-1]) for name, value in made.parameters.items()}


def _none(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    return [0] * made.value_bits


def _by_rom(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    p = _integers(made)
    index = d[p["STEP_LOG2"] :]
    past = g.any_(index[p["INDEX_BITS"] :])
    sums, differences = made.roms
    # both tables as one, with the operation as a further bit of the address
    size = 1 << p["INDEX_BITS"]
    both = [0] * (2 * size)
    both[: len(sums.entries)] = sums.entries
    both[size : size + len(differences.entries)] = differences.entries
    address = [*unsigned(index, p["INDEX_BITS"]), minus]
    return g.masked(g.look_up(address, both, made.value_bits), past ^ 1)


def _by_function(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    """A method of d alone, as the table of it: mitchell and shift."""
    gamma = _integers(made)["GAMMA"]
    power = gamma & (gamma - 1) == 0
    f = gamma.bit_length() - 1
    if made.module == "mitchell" and power:
        wide = max(len(d), f + 2) + 1
        padded = unsigned(d, wide)
        rest = g.sub(constant(2 * gamma, wide), unsigned(padded[:f], wide))
        # one further shift; a quotient past its width shifts everything out
        return unsigned(g.shift_right(rest[1:], padded[f:]), made.value_bits)
    step = f if power else 0
    entries = [int(value) for value in plus[:: 1 << step]]
    address = max((len(entries) - 1).bit_length(), 1)
    past = g.any_(d[step + address :])
    return g.masked(g.look_up(unsigned(d[step:], address), entries, made.value_bits), past ^ 1)


def _segment(g: Graph, p: Mapping[str, int], d: Bits, width_log2: int) -> tuple[Bits, Bits, Bits]:
    """lns_segment: index, place inside, log2 of the width."""
    n, s, index_bits = len(d), p["SEGMENTS_LOG2"], p["INDEX_BITS"]
    position_bits = max((n - 1).bit_length(), 1)
    log_bits = n.bit_length() + 1
    wide = max(n, index_bits, position_bits + s) + 1
    padded = unsigned(d, wide)
    if not p["OCTAVE"]:
        inside = unsigned(padded[:width_log2], n)
        return unsigned(padded[width_log2:], index_bits), inside, constant(width_log2, log_bits)
    _, position = normalize(g, d)
    low = g.any_(padded[s:]) ^ 1
    width = g.masked(g.sub(unsigned(position, log_bits), constant(s, log_bits)), low ^ 1)
    shifted = g.shift_right(padded, width)
    index = g.add(shifted, unsigned([0] * s + width, wide))
    part = g.shift_left(shifted, width)
    return index[:index_bits], g.sub(d, part[:n]), width


def _segments(g: Graph, made: Adder, p: Mapping[str, int], d: Bits, minus: int) -> tuple[Bits, Bits, Bits, int]:
    """Entry, place inside, log2 of the width, and whether d is past the end, of interpolation and polynomials."""
    found = [_segment(g, p, d, p[name]) for name in ("PLUS_WIDTH_LOG2", "MINUS_WIDTH_LOG2")]
    entries = [_read(g, rom, index) for rom, (index, _, _) in zip(made.roms, found, strict=True)]
    past = _past(g, d, minus, p["PLUS_END"], p["MINUS_END"])
    chosen = [g.choose(minus, found[1][i], found[0][i]) for i in (1, 2)]
    return g.choose(minus, entries[1], entries[0]), chosen[0], chosen[1], past


def _interpolated(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    p = _integers(made)
    entry, inside, _, past = _segments(g, made, p, d, minus)
    slope = p["SLOPE_BITS"]
    work = max(len(d) + slope, made.value_bits) + 1
    drop = unsigned(g.multiply(entry[:slope], inside, work)[p["SLOPE_FRACTION"] :], work)
    value = unsigned(entry[slope:], work)
    none = g.or_(past, g.at_least(value, drop) ^ 1)
    return g.masked(g.sub(value, drop)[: made.value_bits], none ^ 1)


def _polynomial(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    p = _integers(made)
    entry, inside, width, past = _segments(g, made, p, d, minus)
    each, bits, degree = p["COEFFICIENT_BITS"], p["HORNER_BITS"], p["DEGREE"]
    work = bits + len(d) + 1
    now = signed(entry[degree * each :][:each], bits)
    for k in reversed(range(degree)):
        product = g.multiply_signed(now, inside, work)
        moved = g.shift_right(product, width, product[-1])
        now = g.add(moved, signed(entry[k * each :][:each], work))[:bits]
    fraction_bits = p["FRACTION"]
    rounded = g.add(signed(now, bits + 1), constant((1 << fraction_bits) >> 1, bits + 1))
    value = signed(rounded[fraction_bits:], max(made.value_bits, bits + 1 - fraction_bits))
    return g.masked(value[: made.value_bits], g.or_(past, rounded[-1]) ^ 1)


def _cotransform(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    p = _integers(made)
    split, n, value_bits = p["SPLIT"], len(d), made.value_bits
    wide = max(n, split, value_bits) + 2
    sums, high_rom, low_rom = made.roms
    padded = unsigned(d, wide)
    low, high = padded[:split], padded[split:]
    from_high, from_low = _read(g, high_rom, high), _read(g, low_rom, low)
    x = unsigned(from_high, wide)
    y = g.add([0] * split + high, unsigned(from_low, wide))
    less = g.at_least(x, y) ^ 1
    least = g.choose(less, x, y)
    gap = g.choose(less, g.sub(y, x), g.sub(x, y))
    at = g.choose(minus, gap, padded)
    end = p["PLUS_END"]
    past = g.at_least(at, constant(end, wide)) if end < 1 << wide else 0
    shared = g.masked(_read(g, sums, at), past ^ 1)
    shared_wide = unsigned(shared, wide)
    both = g.masked(g.sub(least, shared_wide), g.at_least(least, shared_wide))
    end = p["MINUS_END"]
    found = g.choose(g.any_(low), both[:value_bits], from_high)
    found = g.choose(g.any_(high), found, from_low)
    found = g.masked(found, (g.at_least(d, constant(end, n)) if end < 1 << n else 0) ^ 1)
    return g.choose(minus, found, shared)


def _cordic_rounds(
    g: Graph, rounds: int, vectoring: bool, angles: Sequence[int], x: Bits, y: Bits, z: Bits
) -> tuple[Bits, Bits, Bits]:
    """lns_cordic."""
    bits = len(x)
    for i in range(rounds):
        shift = i + 1 - (i > 3) - (i > 13) - (i > 41)
        x_part, y_part = signed(x[shift:] or x[-1:], bits), signed(y[shift:] or y[-1:], bits)
        angle = constant(angles[i], bits)
        up = y[-1] if vectoring else z[-1] ^ 1
        x, y, z = g.add_sub(x, y_part, up ^ 1), g.add_sub(y, x_part, up ^ 1), g.add_sub(z, angle, up)
    return x, y, z


def _cordic(g: Graph, made: Adder, d: Bits, minus: int, plus: Sequence[int]) -> Bits:
    p = _integers(made)
    width, gamma, rounds = p["WIDTH"], p["GAMMA"], p["ITERATIONS"]
    angles = made.roms[0].entries
    bits = width + 8
    gamma_bits = (gamma - 1).bit_length()
    split = max(len(d), gamma_bits + 1)
    padded = unsigned(d, split)
    if gamma & (gamma - 1) == 0:
        f = gamma.bit_length() - 1
        remainder, quotient = padded[:f], padded[f:]
        turn = g.multiply(constant(p["LN2"], p["LN2"].bit_length()), remainder, width + split + 1)[f:]
    else:
        # division by a constant, as the table of what it gives
        turn = g.look_up(padded, [d % gamma * p["LN2"] // gamma for d in range(1 << split)], width + split + 1)
        quotient = g.look_up(padded, [d // gamma for d in range(1 << split)], split)
    start = constant(p["START"], bits)
    x, y, _ = _cordic_rounds(g, rounds, False, angles, start, [0] * bits, unsigned(turn, bits))
    # x < y, both signed
    difference = g.sub(signed(x, bits + 1), signed(y, bits + 1))
    power = g.masked(difference[:bits], difference[-1] ^ 1)
    u = g.shift_right(power, quotient, power[-1])
    v = g.add_sub(constant(1 << width, bits), u, minus)
    none = g.or_(v[-1], g.any_(v) ^ 1)
    v_bits = g.choose(none, constant(1, width + 2), v[: width + 2])
    _, position = normalize(g, v_bits)
    place = len(position)
    zeros = g.masked(g.sub(constant(width, place), position), g.at_least(position, constant(width, place)) ^ 1)
    moved = g.shift_left(unsigned(v_bits, bits), zeros)
    one = constant(1 << width, bits)
    _, _, log_z = _cordic_rounds(g, rounds, True, angles, g.add(moved, one), g.sub(moved, one), [0] * bits)
    ln2 = g.multiply(constant(p["LN2"], p["LN2"].bit_length()), zeros, bits)
    log = g.sub([0, *log_z[:-1]], ln2)
    wide = 2 * width + gamma_bits + 16
    scaled = g.multiply_signed(log, constant(p["SCALE"], p["SCALE"].bit_length()), wide)
    turned = g.add_sub([0] * wide, scaled, minus)
    value = g.add(turned, constant(1 << (2 * width - 1), wide))
    past = _past(g, d, minus, p["PLUS_END"], p["MINUS_END"])
    cut = signed(value[2 * width :], max(made.value_bits, wide - 2 * width))
    return g.masked(cut[: made.value_bits], g.or_(past, value[-1]) ^ 1)


DELTAS = {
    "none": _none,
    "rom": _by_rom,
    "mitchell": _by_function,
    "shift": _by_function,
    "interpolated": _interpolated,
    "polynomial": _polynomial,
    "cotransform": _cotransform,
    "cordic": _cordic,
}
