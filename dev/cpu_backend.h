// What the CPU backend has in the place of a GPU and of NCCL: its device is the host, its collectives go over MPI. The
// trainer includes this file behind what the processes share; the operations are in dev/cpu_ops.h.
#include <sys/mman.h>
#include <sys/resource.h>

static const char* backend_name = "cpu";

static void* device_alloc(size_t bytes) {  // zeroed
    void* p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fatal("out of memory: %zu bytes were asked for", bytes);
    return p;
}
static void device_zero(void* p, size_t bytes) { memset(p, 0, bytes); }
static void copy_to_device(void* device, const void* host, size_t bytes) { memcpy(device, host, bytes); }
static void copy_to_host(void* host, const void* device, size_t bytes) { memcpy(host, device, bytes); }
static void* host_alloc_pinned(size_t bytes) { return ::operator new(bytes); }
static void copy_to_device_async(void* device, const void* host, size_t bytes) { memcpy(device, host, bytes); }
struct DeviceEvent {};
static void event_record(DeviceEvent*) {}
static void event_wait(DeviceEvent*) {}
static void limit_lead() {}
static void device_open(int) {}
static void device_synchronize() {}
static size_t device_memory_free() {
    FILE* f = fopen("/proc/meminfo", "r");
    char line[256];
    long kib = 0;
    while (f && fgets(line, sizeof line, f)) if (sscanf(line, "MemAvailable: %ld", &kib) == 1) break;
    if (f) fclose(f);
    return (size_t)kib * 1024;
}
static size_t device_memory_taken() {  // by this process, at its peak
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t)usage.ru_maxrss * 1024;
}
static std::string device_name() {
    FILE* f = fopen("/proc/cpuinfo", "r");
    char line[256], model[200] = "CPU";
    while (f && fgets(line, sizeof line, f)) if (sscanf(line, "model name : %199[^\n]", model) == 1) break;
    if (f) fclose(f);
    return text("%s, %ld cores", model, sysconf(_SC_NPROCESSORS_ONLN));
}

// On a CPU the operations take every shape and need no memory beside their tensors.
static void operations_open(int, int, int, bool) {}
static void lighthouse_open(const LighthouseShape*) {}
// With --plan-memory what a GPU's take, by the trainer's functions of these names: the encoder's or LayerNorm's
// backward, and attention's sums of dQ and dO O. cuDNN itself has asked for nothing more on any card.
static size_t operations_bytes(int64_t N, int C) {
    if (floatx_bytes == sizeof(floatX)) return 0;
    int64_t ranges = std::min(ceil_div(N, 32), (int64_t)8192);
    return (32 << 20) + std::max(21 * N + 8 * ranges * C, (int64_t)12288 * C);
}
static size_t sdpa_prepare(int B, int64_t T, int H, int D, bool, bool backward) {
    return floatx_bytes == sizeof(floatX) || !backward ? 0 : 4 * (int64_t)B * H * T * (D + 1);
}
// The same, and the parts of a rectangle with their statistics and, backward, the gradients of all slots.
static int64_t causal_prepare(int, const LighthouseShape* s, bool backward) {
    if (floatx_bytes == sizeof(floatX)) return 0;
    int64_t C = (int64_t)s->H * s->D, part = s->T / 2 * C * floatx_bytes;
    if (!backward) return part + s->T / 2 * s->H * sizeof(float);
    return sdpa_prepare(1, s->T, s->H, s->D, true, true) + part + leaf_shape(s).S * 3 * C * floatx_bytes;
}
static void operations_allocate(size_t, size_t) {}
static void fp8_open() {}

#ifdef USE_MPI  // without it the trainer has collectives of one process
// Sends share p of send to process p of the group and receives its share into share p of recv; shares begin
// send_stride and recv_stride bytes apart. A process's own share is copied, where it is not in place already.
static void exchange(Group g, char* recv, int64_t recv_stride, const char* send, int64_t send_stride, int64_t bytes) {
    int size = g == CP_GROUP ? procs.cp : procs.world, rank = g == CP_GROUP ? procs.cp_rank : procs.rank;
    std::vector<MPI_Request> requests(2 * size);
    for (int64_t i = 0; i < bytes; i += 1 << 30) {  // MPI counts in int
        int part = (int)std::min<int64_t>(bytes - i, 1 << 30), n = 0;
        for (int p = 0; p < size; p++)
            if (p != rank) MPI_Irecv(recv + p * recv_stride + i, part, MPI_BYTE, p, 0, group_comm(g), &requests[n++]);
        for (int p = 0; p < size; p++)
            if (p != rank) MPI_Isend(send + p * send_stride + i, part, MPI_BYTE, p, 0, group_comm(g), &requests[n++]);
        wait_for(requests.data(), n);
    }
    if (recv + rank * recv_stride != send + rank * send_stride)
        memcpy(recv + rank * recv_stride, send + rank * send_stride, bytes);
}

// Sums x (n) over all processes, rank r's share r of n / world for itself: x + r n / world then holds the sum, the rest
// of x nothing of use. n is a multiple of world.
static void reduce_scatter(float* x, int64_t n) {
    int64_t share = n / procs.world, chunk = std::min<int64_t>(share, ceil_div(4 << 20, procs.world));
    float* mine = x + procs.rank * share;
    std::vector<float> all(procs.world * chunk);
    for (int64_t i = 0; i < share; i += chunk) {
        int64_t part = std::min(share - i, chunk);
        exchange(WORLD_GROUP, (char*)all.data(), part * sizeof(float), (char*)(x + i), share * sizeof(float),
                 part * sizeof(float));
        for (int64_t j = 0; j < part; j++) {
            float sum = 0;
            for (int rank = 0; rank < procs.world; rank++) sum += all[rank * part + j];
            mine[i + j] = sum;
        }
    }
}

// The same of each of the rows of x (rows, n). Here a collective is complete when its start returns.
static void reduce_scatter_start(float* x, int rows, int64_t n) {
    for (int row = 0; procs.world > 1 && row < rows; row++) reduce_scatter(x + row * n, n);
}

// Gathers the shares of each of the rows of x (rows, bytes): rank r's share r of bytes / world of a row is sent to all.
static void all_gather_start(void* x, int rows, int64_t bytes) {
    int64_t share = bytes / procs.world;
    for (char* row = (char*)x; procs.world > 1 && rows > 0; rows--, row += bytes)
        exchange(WORLD_GROUP, row, share, row + procs.rank * share, 0, share);
}

static void collectives_join() {}

// Share p of send goes to cp rank p, share p of recv comes from it: recv, send (cp, bytes_per_peer), not the same
// memory.
static void all_to_all(void* recv, const void* send, int64_t bytes_per_peer) {
    exchange(CP_GROUP, (char*)recv, bytes_per_peer, (const char*)send, bytes_per_peer, bytes_per_peer);
}

// Sends to cp rank + step and receives as many bytes from cp rank - step, where there is such a rank; step is 1 or -1.
// recv, send: not the same memory.
static void shift(void* recv, const void* send, int64_t bytes, int step) {
    int to = procs.cp_rank + step, from = procs.cp_rank - step;
    for (int64_t i = 0; i < bytes; i += 1 << 30) {
        int part = (int)std::min<int64_t>(bytes - i, 1 << 30), n = 0;
        MPI_Request requests[2];
        if (from >= 0 && from < procs.cp)
            MPI_Irecv((char*)recv + i, part, MPI_BYTE, from, 0, cp_comm, &requests[n++]);
        if (to >= 0 && to < procs.cp)
            MPI_Isend((const char*)send + i, part, MPI_BYTE, to, 0, cp_comm, &requests[n++]);
        wait_for(requests, n);
    }
}

static void collectives_open(int = 1, int64_t = 0, int64_t = 0) {
    barrier();  // MPI_Comm_split waits without a limit
    if (procs.connected) MPI_Comm_split(MPI_COMM_WORLD, procs.dp_rank, procs.cp_rank, &cp_comm);
}
#endif
