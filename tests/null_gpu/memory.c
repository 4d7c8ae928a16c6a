/* The log of events, and memory: of the device, which costs no host memory until something is copied to it, and pinned. */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct event {
  int kind;
  const char *name;
  size_t bytes;
};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long long counts[KINDS], totals[KINDS];
static struct event *events;
static size_t length, room;
static int logging;

void record(enum kind kind, const char *name, size_t bytes) {
  pthread_mutex_lock(&lock);
  counts[kind]++;
  totals[kind] += bytes;
  if (logging) {
    if (length == room) events = realloc(events, (room = room ? 2 * room : 4096) * sizeof *events);
    events[length++] = (struct event){kind, name, bytes};
  }
  pthread_mutex_unlock(&lock);
}

long long null_gpu_count(int kind) { return counts[kind]; }
long long null_gpu_bytes(int kind) { return totals[kind]; }
void null_gpu_reset(void) {
  pthread_mutex_lock(&lock);
  memset(counts, 0, sizeof counts);
  memset(totals, 0, sizeof totals);
  length = 0;
  pthread_mutex_unlock(&lock);
}
void null_gpu_log(int on) { logging = on; }
size_t null_gpu_log_length(void) { return length; }
void null_gpu_log_entry(size_t i, int *kind, const char **name, size_t *bytes) {
  *kind = events[i].kind, *name = events[i].name, *bytes = events[i].bytes;
}

/* Device memory is taken from one reserved range of addresses, from its start on and never twice: what uses freed memory fails. */
#define RANGE (1ull << 44)
#define PAGE 4096ull
static char *start, *next;
static size_t used;
static __thread int device;

static size_t pages(size_t bytes) { return (bytes + PAGE - 1) & ~(PAGE - 1); }

size_t device_memory(void) {
  const char *gib = getenv("NULL_GPU_GIB");
  return (size_t)((gib ? atof(gib) : 80.0) * (1ull << 30));
}

void *map_address(size_t bytes, int usable) {
  pthread_mutex_lock(&lock);
  if (!start) start = next = mmap(0, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char *address = start == MAP_FAILED || next + pages(bytes) > start + RANGE ? 0 : next;
  if (address) next += (pages(bytes) + (1 << 21)) & ~((1ull << 21) - 1); /* aligned as large pages are */
  pthread_mutex_unlock(&lock);
  if (address && usable) set_usable(address, bytes, 1);
  return address;
}

void set_usable(void *address, size_t bytes, int usable) {
  if (!usable) madvise(address, pages(bytes), MADV_DONTNEED);
  mprotect(address, pages(bytes), usable ? PROT_READ | PROT_WRITE : PROT_NONE);
}

int reserve_memory(size_t bytes) {
  pthread_mutex_lock(&lock);
  int fits = used + bytes <= device_memory();
  if (fits) used += bytes;
  pthread_mutex_unlock(&lock);
  return fits;
}

void release_memory(size_t bytes) {
  pthread_mutex_lock(&lock);
  used -= bytes;
  pthread_mutex_unlock(&lock);
}

/* Allocations by address: few enough, as torch asks for large ones and divides them itself. */
struct block {
  char *address;
  size_t bytes;
  enum place place;
};
static struct block *blocks;
static size_t blocks_length, blocks_room;

static void remember(void *address, size_t bytes, enum place place) {
  pthread_mutex_lock(&lock);
  size_t i = 0;
  while (i < blocks_length && blocks[i].address) i++;
  if (i == blocks_room) blocks = realloc(blocks, (blocks_room = blocks_room ? 2 * blocks_room : 256) * sizeof *blocks);
  if (i == blocks_length) blocks_length++;
  blocks[i] = (struct block){address, bytes, place};
  pthread_mutex_unlock(&lock);
}

static struct block forget(void *address) {
  struct block found = {0};
  pthread_mutex_lock(&lock);
  for (size_t i = 0; address && i < blocks_length; i++)
    if (blocks[i].address == address) {
      found = blocks[i];
      blocks[i].address = 0;
      break;
    }
  pthread_mutex_unlock(&lock);
  return found;
}

enum place place_of(const void *address) {
  const char *here = address;
  if (start && here >= start && here < start + RANGE) return DEVICE;
  enum place place = PAGEABLE;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < blocks_length; i++)
    if (blocks[i].address && here >= blocks[i].address && here < blocks[i].address + blocks[i].bytes) place = blocks[i].place;
  pthread_mutex_unlock(&lock);
  return place;
}

int cudaMalloc(void **address, size_t bytes) {
  *address = 0;
  if (!reserve_memory(bytes)) return 2; /* cudaErrorMemoryAllocation */
  *address = map_address(bytes, 1);
  remember(*address, bytes, DEVICE);
  return 0;
}
int cudaMallocAsync(void **address, size_t bytes, void *stream) { return cudaMalloc(address, bytes); }
int cudaFree(void *address) {
  struct block block = forget(address);
  if (block.address) release_memory(block.bytes), set_usable(block.address, block.bytes, 0);
  return 0;
}
int cudaFreeAsync(void *address, void *stream) { return cudaFree(address); }
int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = device_memory(), *available = *total - used;
  return 0;
}
int cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
  *address = mmap(0, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  remember(*address, pages(bytes), PINNED);
  return 0;
}
int cudaMallocHost(void **address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }
int cudaFreeHost(void *address) {
  struct block block = forget(address);
  if (block.address) munmap(block.address, block.bytes);
  return 0;
}
int cudaHostRegister(void *address, size_t bytes, unsigned flags) {
  remember(address, bytes, PINNED);
  return 0;
}
int cudaHostUnregister(void *address) {
  forget(address);
  return 0;
}

int current_device(void) { return device; }
int cudaGetDevice(int *answer) {
  *answer = device;
  return 0;
}
int cudaSetDevice(int wanted) {
  device = wanted;
  return 0;
}

#define REAL_ON_DEVICE (1 << 20)
void copy_on_device(void *to, const void *from, size_t bytes) {
  if (to != from && bytes <= REAL_ON_DEVICE) memmove(to, from, bytes);
}

static int copy(void *to, const void *from, size_t bytes) {
  enum place target = place_of(to), source = place_of(from);
  if (target == DEVICE && source == DEVICE) {
    record(LAUNCH, "copy", bytes);
    copy_on_device(to, from, bytes);
  } else {
    record(target == PAGEABLE || source == PAGEABLE ? PAGEABLE_COPY : COPY, target == DEVICE ? "to device" : "to host", bytes);
    memcpy(to, from, bytes);
    /* A bool that no kernel computed reads true, as in `isfinite().all()`. */
    if (source == DEVICE && bytes == 1) *(char *)to = 1;
  }
  return 0;
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int direction) {
  record(SYNC, "cudaMemcpy", 0);
  return copy(to, from, bytes);
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int direction, void *stream) { return copy(to, from, bytes); }
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes, void *stream) {
  return copy(to, from, bytes);
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int direction,
                      void *stream) {
  for (size_t row = 0; row < height; row++) copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return 0;
}
int cudaMemsetAsync(void *address, int value, size_t bytes, void *stream) {
  record(LAUNCH, "memset", bytes);
  if (bytes <= REAL_ON_DEVICE) memset(address, value, bytes);
  return 0;
}
int cudaMemset(void *address, int value, size_t bytes) { return cudaMemsetAsync(address, value, bytes, 0); }

/* c10::reportMemoryUsageToProfiler(address, change, allocated, reserved, device), which torch's caching allocator calls with a
 * negative change when it takes memory back. That memory is zero from then on, so that nobody reads what others left there. */
void _ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE(char *address, int64_t change, size_t allocated, size_t reserved,
                                                           uint16_t where) {
  static void (*profiler)(void *, int64_t, size_t, size_t, uint16_t);
  if (!profiler) profiler = dlsym(dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD), __func__);
  profiler(address, change, allocated, reserved, where);
  if (change >= 0 || place_of(address) != DEVICE) return;
  char *end = address - change;
  char *inner = (char *)(((uintptr_t)address + PAGE - 1) & ~(PAGE - 1)), *last = (char *)((uintptr_t)end & ~(PAGE - 1));
  if (last < inner + 16 * PAGE) {
    memset(address, 0, -change);
  } else {
    memset(address, 0, inner - address);
    madvise(inner, last - inner, MADV_DONTNEED);
    memset(last, 0, end - last);
  }
}
