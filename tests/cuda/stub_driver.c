// SPDX-License-Identifier: Apache-2.0
/* A libcuda.so.1 that keeps device memory on the host and does everything at once.
 *
 * It is there so that cuda.bindings and what we pass to it run for real. It checks what a driver
 * checks (a context on the thread, known handles, known addresses), and knows nothing of time:
 * order and overlap are the twin's to test. STUB_DEVICES in the environment: how many there are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600 };
enum { PIECES_MAX = 1024, WORK_MAX = 64 };
#define MEMORY_BYTES ((size_t)64 << 20)

typedef struct { char *start; size_t bytes; int is_pinned; } piece;
typedef struct { void *to; const void *of; size_t bytes; int value; } work;
typedef struct { int kind; int is_capturing; int count; work list[WORK_MAX]; } stream;
typedef struct { int kind; int count; work list[WORK_MAX]; } graph;
typedef struct event { int kind; int is_shared; int records; struct event *of; } event;
typedef struct { int kind; } context;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static piece pieces[PIECES_MAX];
static context primary = { 1 };
static stream legacy = { 2 }; /* the default stream */
static int retained, sticky, next_code, pending_queries, wait_ms;
static char next_call[64];
static __thread context *current;
enum { PUSHED_MAX = 4 };
static __thread context *under[PUSHED_MAX];
static __thread int pushed;

/* For the tests. */
void stub_fail_next(const char *call, int code) {
    strncpy(next_call, call, sizeof next_call - 1);
    next_code = code;
}
void stub_fail(int code) { sticky = code; }
void stub_not_ready(int times) { pending_queries = times; }
void stub_wait(int ms) { wait_ms = ms; }
int stub_retained(void) { return retained; }
int stub_pieces(void) {
    int count = 0;
    for (int i = 0; i < PIECES_MAX; i++) count += pieces[i].start != NULL;
    return count;
}

static int enter(const char *call, int needs_context) {
    if (sticky) return sticky;
    if (next_code && !strcmp(call, next_call)) {
        int code = next_code;
        next_code = 0;
        if (code >= 700 && code < 720) sticky = code;
        return code;
    }
    return needs_context && !current ? INVALID_CONTEXT : OK;
}
#define ENTER(needs_context) \
    do { int code_ = enter(__func__, needs_context); if (code_) return code_; } while (0)

static int devices(void) {
    const char *text = getenv("STUB_DEVICES");
    return text ? atoi(text) : 1;
}

static int take(size_t bytes, int is_pinned, char **start) {
    size_t used = 0;
    int place = -1;
    if (!bytes) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < PIECES_MAX; i++) {
        if (pieces[i].start && pieces[i].is_pinned == is_pinned) used += pieces[i].bytes;
        if (!pieces[i].start) place = i;
    }
    int code = OUT_OF_MEMORY;
    if (place >= 0 && used + bytes <= MEMORY_BYTES) {
        *start = aligned_alloc(256, (bytes + 255) / 256 * 256);
        memset(*start, 0xA5, bytes);
        pieces[place] = (piece){ *start, bytes, is_pinned };
        code = OK;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static int give_back(void *start, int is_pinned) {
    int code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int i = 0; start && i < PIECES_MAX; i++) {
        if (pieces[i].start == start && pieces[i].is_pinned == is_pinned) {
            free(start);
            pieces[i] = (piece){ 0 };
            code = OK;
        }
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static int is_device(uintptr_t start, size_t bytes) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < PIECES_MAX; i++) {
        uintptr_t first = (uintptr_t)pieces[i].start;
        found |= first && !pieces[i].is_pinned && start >= first
              && start + bytes <= first + pieces[i].bytes;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static void perform(work w) {
    if (w.of) memcpy(w.to, w.of, w.bytes);
    else memset(w.to, w.value, w.bytes);
}

static int give(stream *s, work w) {
    if (!s) s = &legacy;
    if (!s || s->kind != 2) return INVALID_HANDLE;
    if (!s->is_capturing) perform(w);
    else if (s->count < WORK_MAX) s->list[s->count++] = w;
    else return OUT_OF_MEMORY;
    return OK;
}

int cuInit(unsigned flags) { ENTER(0); return devices() ? OK : NO_DEVICE; }
int cuDriverGetVersion(int *version) { *version = 13020; return OK; }
int cuDeviceGetCount(int *count) { ENTER(0); *count = devices(); return OK; }
int cuDeviceGet(int *device, int ordinal) {
    ENTER(0);
    if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
int cuDeviceGetName(char *name, int bytes, int device) {
    snprintf(name, bytes, device == 1 ? "Stub 2 MIG 1g.5gb" : "Stub %d", device + 1);
    return OK;
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(16 * device + i);
    return OK;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = MEMORY_BYTES; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 75: *value = 8; break;    /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 9; break;    /* COMPUTE_CAPABILITY_MINOR */
    case 18: *value = 0; break;    /* INTEGRATED */
    case 102: *value = 1; break;   /* VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */
    case 103: *value = 1; break;   /* HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
    case 119: *value = 9; break;   /* MEMPOOL_SUPPORTED_HANDLE_TYPES: fds and fabric */
    default: *value = 0;
    }
    return OK;
}
int cuGetErrorString(int code, const char **text) {
    *text = code == 700 ? "an illegal memory access was encountered" : "a stub's error";
    return OK;
}
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR"; return OK; }
int cuDevicePrimaryCtxRetain(context **out, int device) {
    ENTER(0); retained++; *out = &primary; return OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { retained--; return OK; }
int cuCtxSetCurrent(context *wanted) {
    ENTER(0);
    if (wanted != &primary) return INVALID_CONTEXT;
    current = wanted;
    return OK;
}
int cuCtxPushCurrent_v2(context *wanted) {
    ENTER(0);
    if (wanted != &primary || pushed == PUSHED_MAX) return INVALID_CONTEXT;
    under[pushed++] = current;
    current = wanted;
    return OK;
}
int cuCtxPopCurrent_v2(context **popped) {
    if (!pushed) return INVALID_CONTEXT;
    *popped = current;
    current = under[--pushed];
    return OK;
}
int cuCtxSynchronize(void) { ENTER(1); return OK; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER(1);
    size_t used = 0;
    for (int i = 0; i < PIECES_MAX; i++) if (!pieces[i].is_pinned) used += pieces[i].bytes;
    *total = MEMORY_BYTES; *free_bytes = MEMORY_BYTES - used;
    return OK;
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    ENTER(1);
    char *start = NULL;
    int code = take(bytes, 0, &start);
    *address = (uintptr_t)start;
    return code;
}
int cuMemFree_v2(uint64_t address) { ENTER(1); return give_back((void *)(uintptr_t)address, 0); }
int cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    ENTER(1);
    return flags == 1 ? take(bytes, 1, (char **)out) : INVALID_VALUE; /* 1: portable */
}
int cuMemFreeHost(void *start) { ENTER(1); return give_back(start, 1); }
int cuStreamCreate(stream **out, unsigned flags) {
    ENTER(1);
    if (flags != 1) return INVALID_VALUE; /* 1: non-blocking */
    *out = calloc(1, sizeof **out);
    (*out)->kind = 2;
    return OK;
}
int cuStreamDestroy_v2(stream *s) { ENTER(1); s->kind = 0; free(s); return OK; }
int cuStreamSynchronize(stream *s) {
    ENTER(1);
    return !s || s->kind == 2 ? OK : INVALID_HANDLE;
}
int cuStreamWaitEvent(stream *s, event *e, unsigned flags) {
    ENTER(1);
    if (!s) s = &legacy;
    return s && s->kind == 2 && e && e->kind == 3 ? OK : INVALID_HANDLE;
}
int cuEventCreate(event **out, unsigned flags) {
    ENTER(1);
    if (!(flags & 2)) return INVALID_VALUE; /* 1: blocking waits, 2: no timing, 4: shared */
    *out = calloc(1, sizeof **out);
    (*out)->kind = 3;
    (*out)->is_shared = flags == 7;
    return OK;
}
/* Of events of this process: a handle is the event's address. */
int cuIpcGetEventHandle(void *handle, event *e) {
    ENTER(1);
    if (!e || e->kind != 3 || !e->is_shared) return INVALID_HANDLE;
    memset(handle, 0, 64);
    memcpy(handle, &e, sizeof e);
    return OK;
}
typedef struct { char bytes[64]; } event_handle;
int cuIpcOpenEventHandle(event **out, event_handle handle) {
    ENTER(1);
    event *e;
    memcpy(&e, handle.bytes, sizeof e);
    *out = calloc(1, sizeof **out);
    (*out)->kind = 3;
    (*out)->of = e;
    return e ? OK : INVALID_HANDLE;
}
int stub_records(event *e) { return e->records; }
int cuEventRecord(event *e, stream *s) {
    ENTER(1);
    if (!s) s = &legacy;
    if (e && e->kind == 3) (e->of ? e->of : e)->records++;
    return e && e->kind == 3 && s && s->kind == 2 ? OK : INVALID_HANDLE;
}
int cuEventQuery(event *e) {
    ENTER(1);
    if (!e || e->kind != 3) return INVALID_HANDLE;
    return pending_queries && pending_queries-- ? NOT_READY : OK;
}
int cuEventSynchronize(event *e) {
    ENTER(1);
    usleep(wait_ms * 1000);
    return e && e->kind == 3 ? OK : INVALID_HANDLE;
}
int cuEventDestroy_v2(event *e) { ENTER(1); e->kind = 0; free(e); return OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *of, size_t bytes, stream *s) {
    ENTER(1);
    if (!is_device(to, bytes)) return INVALID_VALUE;
    return give(s, (work){ (void *)(uintptr_t)to, of, bytes, 0 });
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t of, size_t bytes, stream *s) {
    ENTER(1);
    if (!is_device(of, bytes)) return INVALID_VALUE;
    return give(s, (work){ to, (void *)(uintptr_t)of, bytes, 0 });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t of, size_t bytes, stream *s) {
    ENTER(1);
    if (!is_device(to, bytes) || !is_device(of, bytes)) return INVALID_VALUE;
    return give(s, (work){ (void *)(uintptr_t)to, (void *)(uintptr_t)of, bytes, 0 });
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, stream *s) {
    ENTER(1);
    if (!is_device(to, bytes)) return INVALID_VALUE;
    return give(s, (work){ (void *)(uintptr_t)to, NULL, bytes, value });
}
int cuStreamBeginCapture_v2(stream *s, int mode) {
    ENTER(1);
    if (mode != 1 || s->is_capturing) return INVALID_VALUE; /* 1: of this thread */
    s->is_capturing = 1; s->count = 0;
    return OK;
}
int cuStreamEndCapture(stream *s, graph **out) {
    ENTER(1);
    if (!s->is_capturing) return INVALID_VALUE;
    s->is_capturing = 0;
    graph *g = calloc(1, sizeof *g);
    g->kind = 4; g->count = s->count;
    memcpy(g->list, s->list, sizeof g->list);
    *out = g;
    return OK;
}
int cuGraphInstantiateWithFlags(graph **out, graph *g, unsigned long long flags) {
    ENTER(1);
    if (!g || g->kind != 4) return INVALID_HANDLE;
    *out = malloc(sizeof *g);
    **out = *g;
    (*out)->kind = 5;
    return OK;
}
int cuGraphDestroy(graph *g) { ENTER(1); g->kind = 0; free(g); return OK; }
int cuGraphLaunch(graph *g, stream *s) {
    ENTER(1);
    if (!g || g->kind != 5) return INVALID_HANDLE;
    for (int i = 0; i < g->count; i++) give(s, g->list[i]);
    return OK;
}
int cuGraphExecDestroy(graph *g) { ENTER(1); g->kind = 0; free(g); return OK; }

/* Virtual memory: an allocation is a memfd, and so is what is exported of it. The layouts are those
 * of cuda.h (CUDA 13). */
typedef struct { int type, id; } location;
typedef struct { int type, handle_types; location where; } allocation_kind;
typedef struct { location where; int flags; } access_wanted;
enum { PAGE = 2 << 20, PINNED = 1, POSIX_FD = 1, ON_DEVICE = 1, READ_WRITE = 3 };

static int is_kind_known(const allocation_kind *kind) {
    return kind && kind->type == PINNED && kind->handle_types == POSIX_FD
        && kind->where.type == ON_DEVICE && kind->where.id == 0;
}
int cuMemGetAllocationGranularity(size_t *bytes, const allocation_kind *kind, int option) {
    ENTER(1);
    *bytes = PAGE;
    return is_kind_known(kind) ? OK : INVALID_VALUE;
}
int cuMemCreate(uint64_t *handle, size_t bytes, const allocation_kind *kind,
                unsigned long long flags) {
    ENTER(1);
    if (!is_kind_known(kind) || bytes % PAGE || flags) return INVALID_VALUE;
    if (bytes > MEMORY_BYTES) return OUT_OF_MEMORY;
    int fd = memfd_create("device memory", 0);
    if (fd < 0 || ftruncate(fd, bytes)) return OUT_OF_MEMORY;
    *handle = fd;
    return OK;
}
int cuMemRelease(uint64_t handle) { ENTER(1); return close(handle) ? INVALID_VALUE : OK; }
int cuMemExportToShareableHandle(void *out, uint64_t handle, int type, unsigned long long flags) {
    ENTER(1);
    if (type != POSIX_FD || flags) return INVALID_VALUE;
    int fd = dup(handle);
    *(int *)out = fd;
    return fd < 0 ? INVALID_VALUE : OK;
}
int cuMemImportFromShareableHandle(uint64_t *handle, void *os_handle, int type) {
    ENTER(1);
    if (type != POSIX_FD) return INVALID_VALUE;
    int fd = dup((int)(intptr_t)os_handle);
    struct stat found;
    if (fd < 0 || fstat(fd, &found) || !S_ISREG(found.st_mode) || found.st_size % PAGE)
        return INVALID_VALUE;
    *handle = fd;
    return OK;
}
int cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t wanted,
                        unsigned long long flags) {
    ENTER(1);
    if (bytes % PAGE || wanted || flags) return INVALID_VALUE;
    void *start = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = (uintptr_t)start;
    return start == MAP_FAILED ? OUT_OF_MEMORY : OK;
}
int cuMemAddressFree(uint64_t address, size_t bytes) {
    ENTER(1);
    return munmap((void *)(uintptr_t)address, bytes) ? INVALID_VALUE : OK;
}
int cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t handle,
             unsigned long long flags) {
    ENTER(1);
    struct stat found;
    if (fstat(handle, &found) || offset + bytes > (size_t)found.st_size || flags)
        return INVALID_VALUE;
    void *start = (void *)(uintptr_t)address;
    if (mmap(start, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, handle, offset) != start)
        return INVALID_VALUE;
    for (int i = 0; i < PIECES_MAX; i++)
        if (!pieces[i].start) {
            pieces[i] = (piece){ start, bytes, 0 };
            return OK;
        }
    return OUT_OF_MEMORY;
}
int cuMemSetAccess(uint64_t address, size_t bytes, const access_wanted *wanted, size_t count) {
    ENTER(1);
    if (count != 1 || wanted->where.type != ON_DEVICE || wanted->flags != READ_WRITE)
        return INVALID_VALUE;
    void *start = (void *)(uintptr_t)address;
    return mprotect(start, bytes, PROT_READ | PROT_WRITE) ? INVALID_VALUE : OK;
}
int cuMemUnmap(uint64_t address, size_t bytes) {
    ENTER(1);
    void *start = (void *)(uintptr_t)address;
    for (int i = 0; i < PIECES_MAX; i++)
        if (pieces[i].start == start && pieces[i].bytes == bytes) {
            pieces[i] = (piece){ 0 };
            int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
            return mmap(start, bytes, PROT_NONE, flags, -1, 0) == start ? OK : INVALID_VALUE;
        }
    return INVALID_VALUE;
}

/* Handles of 64 bytes. A real driver refuses those of the same process; here that is all there is. */
typedef struct { char magic[8]; uint64_t address; char rest[48]; } memory_handle;
static int opened;
int stub_opened(void) { return opened; }
int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t address) {
    ENTER(1);
    for (int i = 0; i < PIECES_MAX; i++) {
        uint64_t start = (uintptr_t)pieces[i].start;
        if (start && start <= address && address < start + pieces[i].bytes) {
            *base = start;
            *bytes = pieces[i].bytes;
            return OK;
        }
    }
    return INVALID_VALUE;
}
int cuIpcGetMemHandle(memory_handle *handle, uint64_t address) {
    ENTER(1);
    memset(handle, 0x7f, sizeof *handle);
    memcpy(handle->magic, "stub-ipc", 8);
    handle->address = address;
    return OK;
}
int cuIpcOpenMemHandle_v2(uint64_t *address, memory_handle handle, unsigned flags) {
    ENTER(1);
    for (int i = 0; i < 48; i++)
        if (handle.rest[i] != 0x7f) return INVALID_HANDLE;
    if (memcmp(handle.magic, "stub-ipc", 8) || flags != 1) return INVALID_HANDLE;
    opened++;
    *address = handle.address;
    return OK;
}
int cuIpcCloseMemHandle(uint64_t address) { ENTER(1); opened--; return OK; }

/* Names without a suffix are asked for; the newest version is meant. */
int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                        int *status) {
    char name[128];
    static const char *const endings[] = { "_v2", "", "WithFlags" };
    *function = NULL;
    if (!strcmp(symbol, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
    for (int i = 0; i < 3 && !*function; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, endings[i]);
        *function = dlsym(RTLD_DEFAULT, name);
        if (!*function) {
            void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
            *function = self ? dlsym(self, name) : NULL;
        }
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
