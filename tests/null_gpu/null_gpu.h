/* A GPU that is not there: what its parts share. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* What a host can ask of a GPU, in the order of `Kind` in __init__.py. */
enum kind { LAUNCH, COLLECTIVE, SYNC, COPY, PAGEABLE_COPY, KINDS };

/* Counts one event, and logs it while the log is on. `name` must outlive the process. */
void record(enum kind kind, const char *name, size_t bytes);

/* Where an address lies. */
enum place { PAGEABLE, PINNED, DEVICE };
enum place place_of(const void *address);

/* A copy within the GPU is a kernel, which computes nothing; but small ones are real: NCCL's callers read shapes that way. */
void copy_on_device(void *to, const void *from, size_t bytes);

/* An answer for whoever asks for a handle: never null, never the same twice. */
void *new_handle(void);

int device_attribute(int attribute);
int current_device(void);
size_t device_memory(void);
int reserve_memory(size_t bytes);
void release_memory(size_t bytes);
void *map_address(size_t bytes, int usable);
void set_usable(void *address, size_t bytes, int usable);
