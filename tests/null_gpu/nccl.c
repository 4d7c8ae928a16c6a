/* NCCL among processes of one machine: a communicator is a file that all of them map, with room for one part of a tensor for each.
 * Collectives really add and copy, at once, in the calling thread. All ranks must call the same ones in the same order: where
 * they do not, each says so, and the call fails, where NCCL would hang. The death of a peer is an error as NCCL's is.
 */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, TYPES };
enum { SUM, PROD, MAX, MIN, AVG };
enum { PART = 1 << 20, MOST_RANKS = 64 };
static const size_t sizes[TYPES] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

struct call {
  char name[24];
  size_t count;
  int type, choice; /* the operation, or the root */
};
struct shared {
  volatile unsigned arrived, generation;
  volatile int processes[MOST_RANKS];
  struct call calls[MOST_RANKS];
  char parts[][PART];
};
struct communicator {
  struct shared *shared;
  int rank, size, splits, error;
  volatile int aborted;
  char name[64];
};
typedef struct {
  char bytes[128];
} unique_id;

static int is_alive(int process) {
  char path[32], status[256] = {0}, *end;
  snprintf(path, sizeof path, "/proc/%d/stat", process);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  size_t length = fread(status, 1, sizeof status - 1, file);
  fclose(file);
  status[length] = 0;
  end = strrchr(status, ')');
  return end && end[2] != 'Z' && end[2] != 'X';
}

/* Until all ranks have come this far. */
static int meet(struct communicator *self) {
  struct shared *shared = self->shared;
  unsigned generation = shared->generation;
  if (__sync_add_and_fetch(&shared->arrived, 1) == (unsigned)self->size) {
    shared->arrived = 0;
    __sync_synchronize();
    shared->generation = generation + 1;
    return SUCCESS;
  }
  for (long turn = 1; shared->generation == generation; turn++) {
    if (self->aborted) return REMOTE_ERROR;
    if (turn % 2048 == 0)
      for (int rank = 0; rank < self->size; rank++)
        if (shared->processes[rank] && !is_alive(shared->processes[rank]) && shared->generation == generation)
          return self->error = REMOTE_ERROR;
    nanosleep(&(struct timespec){.tv_nsec = 20000}, 0);
  }
  __sync_synchronize();
  return SUCCESS;
}

static int begin(struct communicator *self, const char *name, size_t count, int type, int choice) {
  if (type < 0 || type >= TYPES) return INVALID_ARGUMENT;
  record(COLLECTIVE, name, count * sizes[type]);
  if (self->size == 1) return SUCCESS;
  struct call *calls = self->shared->calls, *mine = &calls[self->rank];
  memset(mine, 0, sizeof *mine);
  strncpy(mine->name, name, sizeof mine->name - 1);
  mine->count = count, mine->type = type, mine->choice = choice;
  int error = meet(self);
  for (int rank = 0; !error && rank < self->size; rank++)
    if (memcmp(mine, &calls[rank], sizeof *mine)) {
      fprintf(stderr, "null NCCL: rank %d calls %s of %zu numbers of type %d, rank %d calls %s of %zu numbers of type %d\n",
              self->rank, mine->name, count, type, rank, calls[rank].name, calls[rank].count, calls[rank].type);
      error = INVALID_ARGUMENT;
    }
  int met = meet(self);
  return error ? error : met;
}

static float from_half(uint16_t half) {
  _Float16 value;
  memcpy(&value, &half, 2);
  return value;
}
static uint16_t to_half(double value) {
  _Float16 half = value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
static double load(const char *from, size_t i, int type) {
  uint32_t bits;
  float value;
  switch (type) {
  case INT8: return ((const int8_t *)from)[i];
  case UINT8: return ((const uint8_t *)from)[i];
  case INT32: return ((const int32_t *)from)[i];
  case UINT32: return ((const uint32_t *)from)[i];
  case FLOAT16: return from_half(((const uint16_t *)from)[i]);
  case FLOAT32: return ((const float *)from)[i];
  case BFLOAT16:
    bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    memcpy(&value, &bits, 4);
    return value;
  default: return ((const double *)from)[i];
  }
}
static void store(char *to, size_t i, int type, double value) {
  uint32_t bits;
  float single = value;
  switch (type) {
  case INT8: ((int8_t *)to)[i] = value; break;
  case UINT8: ((uint8_t *)to)[i] = value; break;
  case INT32: ((int32_t *)to)[i] = value; break;
  case UINT32: ((uint32_t *)to)[i] = value; break;
  case FLOAT16: ((uint16_t *)to)[i] = to_half(value); break;
  case FLOAT32: ((float *)to)[i] = single; break;
  case BFLOAT16:
    memcpy(&bits, &single, 4);
    ((uint16_t *)to)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    break;
  default: ((double *)to)[i] = value;
  }
}
static void accumulate(int64_t *whole, double *real, int64_t more_whole, double more_real, int operation) {
  switch (operation) {
  case PROD: *whole *= more_whole, *real *= more_real; break;
  case MAX: *whole = more_whole > *whole ? more_whole : *whole, *real = more_real > *real ? more_real : *real; break;
  case MIN: *whole = more_whole < *whole ? more_whole : *whole, *real = more_real < *real ? more_real : *real; break;
  default: *whole += more_whole, *real += more_real;
  }
}

/* Of numbers [first, first + count) of every rank's part → `to`. */
static void reduce_parts(struct communicator *self, char *to, size_t first, size_t count, int type, int operation) {
  int wide = type == INT64 || type == UINT64;
  for (size_t i = 0; i < count; i++) {
    int64_t whole = 0;
    double real = 0;
    for (int rank = 0; rank < self->size; rank++) {
      const char *part = self->shared->parts[rank];
      int64_t more_whole = wide ? ((const int64_t *)part)[first + i] : 0;
      double more_real = wide ? 0 : load(part, first + i, type);
      if (rank) accumulate(&whole, &real, more_whole, more_real, operation);
      else whole = more_whole, real = more_real;
    }
    if (operation == AVG) whole /= self->size, real /= self->size;
    if (wide) ((int64_t *)to)[i] = whole;
    else store(to, i, type, real);
  }
}

static size_t part_of(size_t count, size_t done, size_t size) {
  size_t most = PART / size;
  return count - done < most ? count - done : most;
}

static int all_reduce(struct communicator *self, const char *from, char *to, size_t count, int type, int operation, int root) {
  size_t size = sizes[type];
  int error = SUCCESS;
  for (size_t done = 0, n; !error && done < count; done += n) {
    n = part_of(count, done, size);
    memcpy(self->shared->parts[self->rank], from + done * size, n * size);
    if ((error = meet(self))) break;
    if (root < 0 || root == self->rank) reduce_parts(self, to + done * size, 0, n, type, operation);
    error = meet(self);
  }
  return error;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, struct communicator *self, void *stream) {
  int error = begin(self, "all_reduce", count, type, operation);
  if (error || self->size == 1) return copy_on_device(to, from, error ? 0 : count * sizes[type]), error;
  return all_reduce(self, from, to, count, type, operation, -1);
}
int ncclReduce(const void *from, void *to, size_t count, int type, int operation, int root, struct communicator *self,
               void *stream) {
  int error = begin(self, "reduce", count, type, operation);
  if (error || self->size == 1) return copy_on_device(to, from, error ? 0 : count * sizes[type]), error;
  return all_reduce(self, from, to, count, type, operation, root);
}
int ncclReduceScatter(const char *from, char *to, size_t count, int type, int operation, struct communicator *self,
                      void *stream) {
  int error = begin(self, "reduce_scatter", count, type, operation);
  if (error || self->size == 1) return copy_on_device(to, from, error ? 0 : count * sizes[type]), error;
  for (int rank = 0; !error && rank < self->size; rank++)
    error = all_reduce(self, from + rank * count * sizes[type], to, count, type, operation, rank);
  return error;
}
int ncclBroadcast(const char *from, char *to, size_t count, int type, int root, struct communicator *self, void *stream) {
  int error = begin(self, "broadcast", count, type, root);
  if (error || self->size == 1) return copy_on_device(to, from, error ? 0 : count * sizes[type]), error;
  size_t size = sizes[type];
  for (size_t done = 0, n; !error && done < count; done += n) {
    n = part_of(count, done, size);
    if (self->rank == root) memcpy(self->shared->parts[root], from + done * size, n * size);
    if ((error = meet(self))) break;
    if (self->rank != root || to != from) memcpy(to + done * size, self->shared->parts[root], n * size);
    error = meet(self);
  }
  return error;
}
int ncclBcast(void *both, size_t count, int type, int root, struct communicator *self, void *stream) {
  return ncclBroadcast(both, both, count, type, root, self, stream);
}
int ncclAllGather(const char *from, char *to, size_t count, int type, struct communicator *self, void *stream) {
  int error = begin(self, "all_gather", count, type, 0);
  if (error || self->size == 1) return copy_on_device(to, from, error ? 0 : count * sizes[type]), error;
  size_t size = sizes[type];
  for (size_t done = 0, n; !error && done < count; done += n) {
    n = part_of(count, done, size);
    memcpy(self->shared->parts[self->rank], from + done * size, n * size);
    if ((error = meet(self))) break;
    for (int rank = 0; rank < self->size; rank++)
      memcpy(to + (rank * count + done) * size, self->shared->parts[rank], n * size);
    error = meet(self);
  }
  return error;
}

static int open_communicator(struct communicator **answer, const char *name, int size, int rank) {
  if (size > MOST_RANKS) return INVALID_ARGUMENT;
  struct communicator *self = calloc(1, sizeof *self);
  self->rank = rank, self->size = size;
  snprintf(self->name, sizeof self->name, "%s", name);
  if (size > 1) {
    size_t bytes = sizeof(struct shared) + (size_t)size * PART;
    int file = open(name, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, bytes)) return perror("null NCCL"), REMOTE_ERROR;
    self->shared = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    self->shared->processes[rank] = getpid();
    int error = meet(self);
    if (error) return error;
    unlink(name); /* all have it mapped */
  }
  *answer = self;
  return SUCCESS;
}

int ncclGetVersion(int *version) {
  *version = 23007;
  return SUCCESS;
}
int ncclGetUniqueId(unique_id *id) {
  static int made;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  memset(id, 0, sizeof *id);
  snprintf(id->bytes, sizeof id->bytes, "/dev/shm/null-nccl-%d-%d-%ld", getpid(), made++, now.tv_nsec);
  return SUCCESS;
}
int ncclCommInitRank(struct communicator **answer, int size, unique_id id, int rank) {
  return open_communicator(answer, id.bytes, size, rank);
}
int ncclCommInitRankConfig(struct communicator **answer, int size, unique_id id, int rank, void *config) {
  return open_communicator(answer, id.bytes, size, rank);
}
int ncclCommInitRankScalable(struct communicator **answer, int size, int rank, int count, unique_id *ids, void *config) {
  return open_communicator(answer, ids->bytes, size, rank);
}
int ncclCommSplit(struct communicator *parent, int color, int key, struct communicator **answer, void *config) {
  int chosen[2 * MOST_RANKS], size = 0, rank = 0;
  int mine[2] = {color, key};
  *answer = 0;
  int error = ncclAllGather((char *)mine, (char *)chosen, 2, INT32, parent, 0);
  if (parent->size == 1) memcpy(chosen, mine, sizeof mine);
  parent->splits++;
  if (error || color < 0) return error;
  for (int other = 0; other < parent->size; other++)
    if (chosen[2 * other] == color) {
      size++;
      rank += chosen[2 * other + 1] < key || (chosen[2 * other + 1] == key && other < parent->rank);
    }
  char name[128];
  snprintf(name, sizeof name, "%s-%d-%d", parent->name, parent->splits, color);
  return open_communicator(answer, name, size, rank);
}
int ncclCommAbort(struct communicator *self) {
  self->aborted = 1;
  return SUCCESS;
}
int ncclCommGetAsyncError(struct communicator *self, int *error) {
  *error = self->error;
  return SUCCESS;
}
int ncclCommCount(struct communicator *self, int *count) {
  *count = self->size;
  return SUCCESS;
}
int ncclCommUserRank(struct communicator *self, int *rank) {
  *rank = self->rank;
  return SUCCESS;
}
int ncclCommCuDevice(struct communicator *self, int *device) {
  *device = current_device();
  return SUCCESS;
}
int ncclRedOpCreatePreMulSum(int *operation, void *scalar, int type, int residence, struct communicator *self) {
  return INVALID_ARGUMENT;
}
int ncclSend(void) { return INVALID_ARGUMENT; }
int ncclRecv(void) { return INVALID_ARGUMENT; }
const char *ncclGetErrorString(int error) {
  return error == REMOTE_ERROR ? "remote process exited or there was a network error" : "invalid argument";
}
const char *ncclGetLastError(struct communicator *self) { return ""; }
int ncclMemAlloc(void **address, size_t bytes) { return cudaMalloc(address, bytes); }
int ncclMemFree(void *address) { return cudaFree(address); }
