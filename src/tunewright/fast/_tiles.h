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
