/* Small matrix products in registers, C = A B, bfloat16 or float in and float out.

   A *unit* is 32 bits along the summed dimension: one float, or two neighbouring bfloat16. One instruction multiplies a unit of
   the left operand, repeated in every lane, with LANES units of the right one and adds to LANES sums:

       left  A [rows][units]      any strides: what is summed along its rows can be read where it lies
       right B [units][columns]   columns side by side, their number a multiple of LANES

   Operands with another order are packed first. `pack_rows` keeps the order (and adds the zeros that fill up rows and columns),
   `pack_pairs` sums down the rows of the source, so that for bfloat16 it interleaves each two of them, and `pack_across`
   transposes: it sums along the rows of the source and has one column for each. */

#pragma once
#include "lanes.h"

#define ROWS 4 /* rows of C formed together */
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECS 4 /* vectors of C a row: 16 sums of the 32 registers */
#else
#define VECS 2
#endif
#define PANEL (VECS * LANES)

/* A function of its own: where several loops share one, gcc runs out of registers for the innermost. */
#define APART static __attribute__((noinline))

typedef uint32_t unit;

typedef struct {
    const unit *at;
    long row, step; /* units from one row to the next, and from one unit of a row to the next */
} left_units;

typedef struct {
    const unit *at;
    long step, panel; /* units from one to the next along the sum, and from PANEL columns to the next PANEL */
} right_units;

/* Numbers to a unit. */
INLINE long unit_width(int bf16) { return bf16 ? 2 : 1; }

INLINE long units_for(long numbers, int bf16) { return bf16 ? (numbers + 1) / 2 : numbers; }

INLINE long min_long(long a, long b) { return a < b ? a : b; }

INLINE long max_long(long a, long b) { return a > b ? a : b; }

INLINE long round_up(long value, long to) { return (value + to - 1) / to * to; }

INLINE lanes dot_units(lanes sum, bit_lanes a, bit_lanes b, const int bf16) {
    if (!bf16) return sum + (lanes)a * (lanes)b;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (lanes)(a << 16) * (lanes)(b << 16);
    return sum + (lanes)(a & 0xffff0000) * (lanes)(b & 0xffff0000);
#endif
}

INLINE bit_lanes load_units(const unit *from) {
    bit_lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* C[ROWS][vecs * LANES] = keep * C + A B; keep[r] scales row r of what C holds, NULL forgets it. */
INLINE void product_tile(left_units a, right_units b, long units, float *c, long c_row, const float *keep, const int vecs, const int bf16) {
    lanes sum[ROWS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[r][v] = keep ? keep[r] * load(c + r * c_row + v * LANES) : splat(0);
    for (long u = 0; u < units; u++) {
        bit_lanes w[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) w[v] = (bit_lanes)hold((const float *)(b.at + u * b.step + v * LANES));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            bit_lanes x = (bit_lanes){0} + a.at[r * a.row + u * a.step];
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[r][v] = dot_units(sum[r][v], x, w[v], bf16);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

/* The same for any number of columns that is a multiple of LANES. */
INLINE void product_columns(left_units a, right_units b, long units, long columns, float *c, long c_row, const float *keep,
                            const int bf16) {
    for (; columns >= PANEL; columns -= PANEL, b.at += b.panel, c += PANEL) product_tile(a, b, units, c, c_row, keep, VECS, bf16);
    if (VECS > 3 && columns == 3 * LANES) product_tile(a, b, units, c, c_row, keep, 3, bf16);
    else if (VECS > 2 && columns == 2 * LANES) product_tile(a, b, units, c, c_row, keep, 2, bf16);
    else if (columns == LANES) product_tile(a, b, units, c, c_row, keep, 1, bf16);
}

APART void product_bf16(left_units a, right_units b, long units, long columns, float *c, long c_row, const float *keep) {
    product_columns(a, b, units, columns, c, c_row, keep, 1);
}

APART void product_fp32(left_units a, right_units b, long units, long columns, float *c, long c_row, const float *keep) {
    product_columns(a, b, units, columns, c, c_row, keep, 0);
}

/* C[ROWS][columns] = keep * C + A B. */
INLINE void product(left_units a, right_units b, long units, long columns, float *c, long c_row, const float *keep, const int bf16) {
    if (bf16) product_bf16(a, b, units, columns, c, c_row, keep);
    else product_fp32(a, b, units, columns, c, c_row, keep);
}

/* ---- packing: `rows` of `width` numbers, `stride` numbers apart, into units; what lies outside becomes zero ---- */

/* to[up to `rows_to`][units_for(width)]: the order kept. */
INLINE void pack_rows(unit *to, long rows_to, const void *from, long stride, long rows, long width, const int bf16) {
    const long units = units_for(width, bf16), size = bf16 ? 2 : 4;
    for (long r = 0; r < rows; r++) {
        to[r * units + units - 1] = 0;
        memcpy(to + r * units, (const char *)from + r * stride * size, width * size);
    }
    memset(to + rows * units, 0, (rows_to - rows) * units * sizeof(unit));
}

/* Units of two rows of bfloat16 that lie in upper halves; the lower ones must be zero. */
INLINE bit_lanes pair_units(bit_lanes first, bit_lanes second) { return first >> 16 | second; }

/* Numbers of a row in upper halves, rounded to bfloat16 if they are not; zero where the row does not reach. */
INLINE bit_lanes upper_halves(row r, long at, int there) {
    if (!there || at >= r.length) return (bit_lanes){0};
    return (bit_lanes)(r.bf16 ? load_row(r, at) : widen(narrow(load_row(r, at))));
}

/* to[units_for(rows_to)][columns]: summed down the rows, which hold bfloat16 if `from_bf16`. */
INLINE void pack_pairs(unit *to, long columns, long rows_to, const void *from, long stride, long rows, long width, const int from_bf16,
                       const int bf16) {
    const long bytes = stride * (from_bf16 ? 2 : 4), wide = unit_width(bf16);
    for (long r = 0; r < rows_to; r += wide, to += columns) {
        const row first = {(char *)from + r * bytes, width, from_bf16, 0}, second = {(char *)from + (r + 1) * bytes, width, from_bf16, 0};
        for (long at = 0; at < columns; at += LANES) {
            bit_lanes v = {0};
            if (bf16) v = pair_units(upper_halves(first, at, r < rows), upper_halves(second, at, r + 1 < rows));
            else if (r < rows && at < width) v = (bit_lanes)load_row(first, at);
            memcpy(to + at, &v, sizeof v);
        }
    }
}

#if defined(__AVX512F__)
/* to[u][r] = from[r][u] for LANES rows, `stride` bytes apart, of LANES units. */
INLINE void transpose_units(unit *to, long step, const char *from, long stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) /* pairs of rows: units 0 1 of each four, then 2 3 */
        b[i] = i % 2 ? _mm512_unpackhi_epi32(a[i - 1], a[i]) : _mm512_unpacklo_epi32(a[i], a[i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) { /* fours of rows: unit i % 4 of each four */
        const int low = i / 4 * 4 + i % 4 / 2;
        a[i] = i % 2 ? _mm512_unpackhi_epi64(b[low], b[low + 2]) : _mm512_unpacklo_epi64(b[low], b[low + 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) { /* eights of rows: fours 0 and 2, or 1 and 3 */
        const int low = i / 8 * 8 + i % 4;
        b[i] = i % 8 / 4 ? _mm512_shuffle_i32x4(a[low], a[low + 4], 0xdd) : _mm512_shuffle_i32x4(a[low], a[low + 4], 0x88);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const int low = i % 8;
        const __m512i v = i / 8 ? _mm512_shuffle_i32x4(b[low], b[low + 8], 0xdd) : _mm512_shuffle_i32x4(b[low], b[low + 8], 0x88);
        _mm512_storeu_si512(to + (low % 4 + i / 8 * 8 + low / 4 * 4) * step, v);
    }
}
#else
INLINE void transpose_units(unit *to, long step, const char *from, long stride) {
    for (long u = 0; u < LANES; u++)
        for (long r = 0; r < LANES; r++) memcpy(to + u * step + r, from + r * stride + u * sizeof(unit), sizeof(unit));
}
#endif

/* LANES units of each of LANES rows as they will be: copied, rounded to bfloat16, or filled up with zeros. */
INLINE void prepare_corner(unit *to, const char *from, long bytes, long rows, long numbers, const int from_bf16, const int bf16) {
    const long wide = LANES * unit_width(bf16);
    for (long r = 0; r < LANES; r++) {
        const row source = {(char *)from + r * bytes, numbers, from_bf16, 0}, target = {to + r * LANES, wide, bf16, 1};
        for (long at = 0; at < wide; at += LANES)
            if (r < rows && at < numbers) store_row(target, at, load_row(source, at));
            else store_row(target, at, splat(0));
    }
}

/* to[columns / PANEL][units_for(width)][PANEL]: summed along the rows, row r becomes column r. */
INLINE void pack_across(unit *to, long columns, const void *from, long stride, long rows, long width, const int from_bf16, const int bf16) {
    const long size = from_bf16 ? 2 : 4, units = units_for(width, bf16), wide = unit_width(bf16);
    for (long r = 0; r < columns; r += LANES)
        for (long u = 0; u < units; u += LANES) {
            const char *corner = (const char *)from + (r * stride + u * wide) * size;
            unit *block = to + (r / PANEL * units + u) * PANEL + r % PANEL, ready[LANES * LANES], turned[LANES * LANES];
            const int whole = from_bf16 == bf16 && r + LANES <= rows && (u + LANES) * wide <= width;
            if (!whole) prepare_corner(ready, corner, stride * size, rows - r, width - u * wide, from_bf16, bf16);
            if (whole) transpose_units(block, PANEL, corner, stride * size);
            else if (u + LANES <= units) transpose_units(block, PANEL, (char *)ready, sizeof(unit) * LANES);
            else {
                transpose_units(turned, LANES, (char *)ready, sizeof(unit) * LANES);
                for (long i = 0; i < units - u; i++) memcpy(block + i * PANEL, turned + i * LANES, sizeof(unit) * LANES);
            }
        }
}
