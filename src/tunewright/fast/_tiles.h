// Matrix units (Intel AMX): eight registers of 16 rows of 64 bytes.
//
// They multiply A [16 x 32 bf16] by B [32 x 16 bf16] into C [16 x 16 fp32]; B holds pairs of rows side by side in 32 bits.

#pragma once

#include "_vectors.h"

#include <sys/syscall.h>
#include <unistd.h>

// Ask Linux for the right to use matrix units; 0 if it is given
extern "C" int allow() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // of arch_prctl(2)
    return int(syscall(SYS_arch_prctl, REQUEST, TILE_DATA));
}

struct Tiles {  // the thread's tile configuration while it is in here; the one it had before afterwards
    alignas(64) unsigned char before[64];
    Tiles() {
        _tile_storeconfig(before);
        alignas(64) unsigned char ours[64] = {1};
        for (int i = 0; i < 8; ++i) {
            ours[16 + 2 * i] = 64;  // bytes of a row
            ours[48 + i] = 16;      // rows
        }
        asm volatile("" : : "r"(ours) : "memory");  // the compiler may think that less of it is read
        _tile_loadconfig(ours);
    }
    ~Tiles() {
        if (before[0])
            _tile_loadconfig(before);
        else
            _tile_release();
    }
};

inline void transpose(__m512i r[16]) {  // 16 x 16 of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}
