// PyTorch's memory for large tensors, apart from all other allocations of the process.
//
// Free pieces lie in one range of addresses that only tensors of 64 KB and more are taken from, the smallest piece
// that is large enough first; neighbours that are free become one again. What a step frees is whole for the next one.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

constexpr size_t LARGE = size_t(1) << 16, PIECE = size_t(4) << 10, HUGE = size_t(2) << 20, GROWTH = size_t(64) << 20;

size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

struct Arena {
    std::mutex busy;
    std::map<char*, size_t> free, used;            // by address
    std::set<std::pair<size_t, char*>> by_size;    // the free ones
    size_t reach = 0, taken = 0, most = 0;         // bytes: to be had, in use, in use at most
    char *floor = nullptr, *edge = nullptr;        // addresses that are reserved and not yet to be had
    bool resting = true;                           // nothing is taken; what comes back goes to the system

    void put(char* at, size_t size) {
        auto after = free.lower_bound(at);
        if (after != free.end() && at + size == after->first) {
            size += after->second;
            by_size.erase({after->second, after->first});
            after = free.erase(after);
        }
        if (after != free.begin()) {
            auto before = std::prev(after);
            if (before->first + before->second == at) {
                at = before->first;
                size += before->second;
                by_size.erase({before->second, before->first});
                free.erase(before);
            }
        }
        free[at] = size;
        by_size.insert({size, at});
    }

    // Addresses for all that the machine has. They are no memory; but whatever else the process maps does not come to lie
    // where the arena grows, so that a large tensor never finds two pieces which together would be large enough.
    void reserve() {
        rlimit most;
        if (getrlimit(RLIMIT_AS, &most) || most.rlim_cur != RLIM_INFINITY) return;  // they would be counted
        const size_t size = up(size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)), GROWTH);
        void* found = mmap(nullptr, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) return;
        floor = reinterpret_cast<char*>(up(reinterpret_cast<uintptr_t>(found), HUGE));
        edge = floor + size;
        madvise(floor, size, MADV_HUGEPAGE);
    }

    // The next of them.
    bool deepen(size_t size) {
        if (!edge) reserve();
        const auto above = free.find(edge);  // a free piece there needs only what it lacks
        if (above != free.end()) size -= std::min(size, above->second);
        size = up(size, GROWTH);
        if (size_t(edge - floor) < size || mprotect(edge - size, size, PROT_READ | PROT_WRITE)) return false;
        edge -= size;
        reach += size;
        put(edge, size);
        return true;
    }

    // More addresses where none are reserved, below those there are: a free piece at their beginning needs only what it lacks.
    bool grow(size_t size, bool elsewhere) {
        char* first = nullptr;
        if (!elsewhere && !(free.empty() && used.empty())) {
            first = free.empty() ? used.begin()->first
                  : used.empty() ? free.begin()->first : std::min(free.begin()->first, used.begin()->first);
            auto lowest = free.find(first);
            if (lowest != free.end() && lowest->second < size) size -= lowest->second;
        }
        size = up(size, GROWTH);
        void* hint = first ? first - size : nullptr;
        void* found = mmap(hint, size + (first ? 0 : HUGE), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) return false;
        char* at = reinterpret_cast<char*>(up(reinterpret_cast<uintptr_t>(found), first ? 1 : HUGE));
        madvise(at, size, MADV_HUGEPAGE);
        reach += size;
        put(at, size);
        return true;
    }

    void* take(size_t bytes) {
        const std::lock_guard<std::mutex> alone(busy);
        if (resting) return nullptr;
        const size_t size = up(bytes, PIECE);
        auto fit = by_size.lower_bound({size, nullptr});
        if (fit == by_size.end() && deepen(size)) fit = by_size.lower_bound({size, nullptr});
        for (const bool elsewhere : {false, true}) {  // the system need not map where it is asked to
            if (fit != by_size.end()) break;
            if (!grow(size, elsewhere)) return nullptr;
            fit = by_size.lower_bound({size, nullptr});
        }
        const auto [whole, at] = *fit;
        by_size.erase(fit);
        free.erase(at);
        char* mine = at + (whole - size);  // from the end: what is left stays where growth would add to it
        if (whole > size) put(at, whole - size);
        used[mine] = size;
        taken += size;
        most = std::max(most, taken);
        return mine;
    }

    bool give_back(void* pointer) {
        const std::lock_guard<std::mutex> alone(busy);
        auto found = used.find(static_cast<char*>(pointer));
        if (found == used.end()) return false;
        const auto [at, size] = *found;
        used.erase(found);
        taken -= size;
        put(at, size);
        if (resting) madvise(at, size, MADV_DONTNEED);
        return true;
    }

    void wake() {
        const std::lock_guard<std::mutex> alone(busy);
        resting = false;
    }

    void rest() {
        const std::lock_guard<std::mutex> alone(busy);
        resting = true;
        for (const auto& [at, size] : free) madvise(at, size, MADV_DONTNEED);
    }
};

Arena& arena() {
    static Arena* one = new Arena();  // never destroyed: tensors may outlive everything else
    return *one;
}

void release(void* pointer) {
    if (!pointer) return;
    c10::profiledCPUMemoryReporter().Delete(pointer);
    if (!arena().give_back(pointer)) c10::free_cpu(pointer);
}

struct Allocator final : at::Allocator {
    at::DataPtr allocate(size_t bytes) override {
        void* data = bytes >= LARGE ? arena().take(bytes) : nullptr;
        if (!data) data = c10::alloc_cpu(bytes);  // which says so if there is none
        c10::profiledCPUMemoryReporter().New(data, bytes);
        return {data, data, &release, at::Device(at::DeviceType::CPU)};
    }
    at::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator& allocator() {
    static Allocator* one = new Allocator();
    return *one;
}

at::Allocator* before = nullptr;

}  // namespace

extern "C" {

// It needs no right of its own
int allow() { return 0; }

// From now on large tensors are taken from the arena
void begin() {
    arena().wake();
    if (before) return;
    before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&allocator(), 255);
}

// From now on they are not, and what is free goes to the system. Tensors that are there stay valid.
void end() {
    if (before) c10::SetCPUAllocator(before, 255);
    before = nullptr;
    arena().rest();
}

// What is free now goes to the system, what will be freed later does not
void let_go() {
    arena().rest();
    arena().wake();
}

// Bytes: mapped, in use, in use at most since this was asked last
void told(size_t* sizes) {
    const std::lock_guard<std::mutex> alone(arena().busy);
    sizes[0] = arena().reach;
    sizes[1] = arena().taken;
    sizes[2] = arena().most;
    arena().most = arena().taken;
}
}
