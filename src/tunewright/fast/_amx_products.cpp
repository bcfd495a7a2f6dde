// Products of bf16 matrices on matrix units (Intel AMX) whose operands do not lie as the units want them.
//
// C [M x N] = A [M x K] B [K x N], each side in any order. Both sides are first laid out in panels of 32 rows or
// columns, tile by tile, DEPTH of K at a time: a panel of each stays in the first cache, where all panels of A meet one
// of B; the fp32 sums of a part of C stay in the second (as GotoBLAS does; Goto, van de Geijn 2008, doi:10.1145/1356052.1356053).

#include "_tiles.h"
#include "_vectors.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include <omp.h>
#include <sys/mman.h>

namespace {

constexpr int64_t SIDE = 32, BLOCK = SIDE * SIDE;  // of a panel; numbers of a block of four tiles
constexpr int64_t DEPTH = 320;
constexpr int64_t ROWS = 512;
constexpr int64_t SUMS = 1 << 18;          // fp32 numbers of a part of C
constexpr int64_t PACKED = 4 << 20;        // numbers of B that are laid out once for all rows
constexpr size_t HUGE = size_t(2) << 20;

struct Side {  // a matrix by its distance from one row of A, or column of B, to the next, and along K
    const bf16* at;
    int64_t x, k;
    Side from(int64_t first, int64_t deep) const { return {at + first * x + deep * k, x, k}; }
};

struct Out {
    bf16* at;
    int64_t row;
};

int64_t parts(int64_t n, int64_t most) { return (n + most - 1) / most; }
int64_t up(int64_t n, int64_t to) { return parts(n, to) * to; }
int64_t evenly(int64_t n, int64_t most) { return up(parts(n, parts(n, most)), SIDE); }

class Room {  // a thread's own, kept from call to call
    char* at = nullptr;
    size_t size = 0;

  public:
    template <typename T>
    T* of(int64_t numbers) {  // nothing if there is no memory
        const size_t bytes = (numbers * sizeof(T) + HUGE - 1) / HUGE * HUGE;
        if (bytes > size) {
            std::free(at);
            at = static_cast<char*>(std::aligned_alloc(HUGE, bytes));
            size = at ? bytes : 0;
            if (at) madvise(at, bytes, MADV_HUGEPAGE);
        }
        return reinterpret_cast<T*>(at);
    }
    ~Room() { std::free(at); }
};

// ---- panels

inline __m512i some(const bf16* at, int64_t n) {
    if (n >= 32) return _mm512_loadu_si512(at);
    return n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((1u << n) - 1, at);
}

inline void store(bf16* to, const __m512i r[16]) {
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * i, r[i]);
}

// Up to 32 rows or columns, `deep` of K: two tiles for each 32 of K, that hold rows (A), or pairs of K side by side (B).
// Zeros fill up what is missing.
template <bool PAIRS>
void lay_out(bf16* to, Side from, int64_t count, int64_t deep) {
    alignas(64) static constexpr uint16_t TAKEN[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(TAKEN), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i r[16], s[16];
    for (int64_t k = 0; k < deep; k += 32, to += BLOCK) {
        if (from.k == 1) {
            for (int64_t half = 0; half < 32; half += 16) {
                for (int i = 0; i < 16; ++i)
                    r[i] = some(from.at + (half + i) * from.x + k, half + i < count ? deep - k : 0);
                if (PAIRS) transpose(r);
                store(to + half * 32, r);
            }
            continue;
        }
        for (int i = 0; i < 16; ++i) {
            const int64_t even = k + 2 * i;
            const bf16 *a = from.at + even * from.k, *b = a + from.k;
            const __m512i one = some(a, even < deep ? count : 0), other = some(b, even + 1 < deep ? count : 0);
            __builtin_prefetch(a + 32, 0, 2);  // the next panel's: no hardware foresees steps so wide
            __builtin_prefetch(b + 32, 0, 2);
            r[i] = _mm512_permutex2var_epi16(one, low, other);
            s[i] = _mm512_permutex2var_epi16(one, high, other);
        }
        if (!PAIRS) {
            transpose(r);
            transpose(s);
        }
        store(to, r);
        store(to + 512, s);
    }
}

// Four tiles of C (+)= a panel of A by a panel of B
inline void multiply(float* C, const bf16* A, const bf16* B, int64_t deep, bool add) {
    if (add) {
        _tile_loadd(0, C, 64);
        _tile_loadd(1, C + 256, 64);
        _tile_loadd(2, C + 512, 64);
        _tile_loadd(3, C + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < deep; k += 32, A += BLOCK, B += BLOCK) {
        _tile_loadd(6, B, 64);
        _tile_loadd(4, A, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, B + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, A + 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, 64);
    _tile_stored(1, C + 256, 64);
    _tile_stored(2, C + 512, 64);
    _tile_stored(3, C + 768, 64);
}

// Four tiles of sums, rounded to their place
void put(Out out, const float* C, int64_t rows, int64_t columns) {
    const __mmask32 kept = columns >= 32 ? ~0u : (1u << columns) - 1;
    for (int64_t r = 0; r < rows; ++r, out.at += out.row) {
        const float* from = C + r / 16 * 512 + r % 16 * 16;
        const __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + 256);
        _mm512_mask_storeu_epi16(out.at, kept, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
}

// ---- one thread's part

// C, block by block down its columns, (+)= panels of A by those of B that `panel` gives
template <typename Panel>
void add_up(float* C, const bf16* A, Panel panel, int64_t m, int64_t n, int64_t deep, bool add) {
    for (int64_t j = 0; j < n; j += SIDE) {
        const bf16* B = panel(j);
        for (int64_t i = 0; i < m; i += SIDE, C += BLOCK) multiply(C, A + i * up(deep, 32), B, deep, add);
    }
}

void lay_out_rows(bf16* A, Side a, int64_t m, int64_t deep) {
    for (int64_t i = 0; i < m; i += SIDE) lay_out<false>(A + i * up(deep, 32), a.from(i, 0), std::min(SIDE, m - i), deep);
}

struct Rooms {
    Room a, b, c;
};

// Sums of few rows and columns: as they are, for others to be added. Nothing if there is no memory.
float* sums(Side a, Side b, int64_t m, int64_t n, int64_t k, Rooms& rooms) {
    const Tiles tiles;
    const int64_t deepest = evenly(k, DEPTH);
    bf16 *A = rooms.a.of<bf16>(up(m, SIDE) * deepest), *B = rooms.b.of<bf16>(SIDE * deepest);
    float* C = rooms.c.of<float>(up(m, SIDE) * up(n, SIDE));
    if (!A || !B || !C) return nullptr;
    for (int64_t first = 0; first < k; first += deepest) {
        const int64_t deep = std::min(deepest, k - first);
        lay_out_rows(A, a.from(0, first), m, deep);
        auto panel = [&](int64_t j) {
            lay_out<true>(B, b.from(j, first), std::min(SIDE, n - j), deep);
            return B;
        };
        add_up(C, A, panel, m, n, deep, first > 0);
    }
    return C;
}

// Whether there was memory for it
bool product(Out out, Side a, Side b, int64_t m, int64_t n, int64_t k, Rooms& rooms) {
    const Tiles tiles;
    const int64_t deepest = evenly(k, DEPTH), all = up(k, deepest);
    const int64_t columns = evenly(n, std::max(SIDE, std::min(SUMS / 128, PACKED / all)));
    const int64_t rows = evenly(m, std::min(ROWS, SUMS / columns));
    const bool once = rows >= m;  // then a panel of B is met by all of A at once, and need not be kept
    bf16 *A = rooms.a.of<bf16>(rows * deepest), *B = rooms.b.of<bf16>(once ? SIDE * deepest : columns * all);
    float* C = rooms.c.of<float>(rows * columns);
    if (!A || !B || !C) return false;
    for (int64_t j = 0; j < n; j += columns) {
        const int64_t wide = std::min(columns, n - j);
        for (int64_t i = 0; i < m; i += rows) {
            const int64_t high = std::min(rows, m - i);
            for (int64_t first = 0; first < k; first += deepest) {
                const int64_t deep = std::min(deepest, k - first);
                lay_out_rows(A, a.from(i, first), high, deep);
                auto panel = [&](int64_t at) {
                    bf16* own = once ? B : B + first * columns + at * up(deep, 32);
                    if (i == 0) lay_out<true>(own, b.from(j + at, first), std::min(SIDE, wide - at), deep);
                    return own;
                };
                add_up(C, A, panel, high, wide, deep, first > 0);
            }
            const float* from = C;
            for (int64_t v = 0; v < wide; v += SIDE)
                for (int64_t u = 0; u < high; u += SIDE, from += BLOCK)
                    put({out.at + (i + u) * out.row + j + v, out.row}, from, std::min(SIDE, high - u), std::min(SIDE, wide - v));
        }
    }
    return true;
}

}  // namespace

extern "C" {

// `sizes` are M, N, K, then distances: of C's rows, of A's rows and columns, of B's columns and rows. 0, or 1 if there is
// no memory.
int multiply(bf16* c, const bf16* a, const bf16* b, const int64_t* sizes) {
    const int64_t m = sizes[0], n = sizes[1], k = sizes[2];
    const Out C{c, sizes[3]};
    const Side A{a, sizes[4], sizes[5]}, B{b, sizes[6], sizes[7]};
    // Threads share K where C is small, or else C's longer side
    const int64_t numbers = up(m, SIDE) * up(n, SIDE), high = up(m, SIDE) / SIDE;
    const bool share_depth = numbers <= 2 * SUMS && k >= 8 * std::max(m, n);
    std::vector<float*> found(omp_get_max_threads());
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        static thread_local Rooms rooms;
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t whole = share_depth ? k : std::max(m, n), each = up(parts(whole, threads), SIDE);
        const int64_t first = std::min(whole, me * each), count = std::min(each, whole - first);
        if (!share_depth && count > 0) {
            failed = m >= n ? !product({C.at + first * C.row, C.row}, A.from(first, 0), B, count, n, k, rooms)
                            : !product({C.at + first, C.row}, A, B.from(first, 0), m, count, k, rooms);
        } else if (share_depth) {
            if (count > 0) found[me] = sums(A.from(0, first), B.from(0, first), m, n, count, rooms);
            failed = count > 0 && !found[me];
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t block = 0; block < numbers / BLOCK; ++block) {
                if (!found[0]) continue;
                float* sum = found[0] + block * BLOCK;
                for (int64_t other = 1; other < threads && found[other]; ++other)
                    for (int64_t at = 0; at < BLOCK; at += 16)
                        _mm512_store_ps(sum + at, _mm512_add_ps(_mm512_load_ps(sum + at),
                                                                _mm512_load_ps(found[other] + block * BLOCK + at)));
                const int64_t i = block % high * SIDE, j = block / high * SIDE;
                put({C.at + i * C.row + j, C.row}, sum, std::min(SIDE, m - i), std::min(SIDE, n - j));
            }
        }
    }
    return failed;
}
}
