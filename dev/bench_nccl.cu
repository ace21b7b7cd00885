// Measures the trainer's own collectives for scripts/bench_scaling: each at the sizes given, call after call, on as
// many ranks as mpirun starts. NCCL between GPUs; as build/bench_nccl_cpu, MPI on the CPU backend. Rank 0 prints one
// line of JSON a measurement.
//
//   make build/bench_nccl
//   mpirun -n 8 build/bench_nccl cp=8 reduce_scatter=50331648 all_gather=25165824 all_to_all=75497472
//
// A size is the bytes of the whole buffer on one rank, of which it sends the share of the others: (ranks - 1) / ranks,
// in all_to_all and shift of the cp ranks of its group, all groups at once: all but the last of a group send all of
// what they shift. The rate is that of the bytes sent.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#include <vector>

struct Measurement {
    const char* call;
    int64_t bytes;  // of the buffer, a multiple of what the ranks share
    int ranks;      // that exchange it
};

static void run_call(const Measurement& x, char* recv, char* send) {
    if (!strcmp(x.call, "reduce_scatter")) reduce_scatter_start((float*)send, 1, x.bytes / sizeof(float));
    else if (!strcmp(x.call, "all_gather")) all_gather_start(send, 1, x.bytes);
    else if (!strcmp(x.call, "shift")) shift(recv, send, x.bytes, 1);
    else all_to_all(recv, send, x.bytes / x.ranks);
}

// Milliseconds of one call among `calls` that follow each other, on the slowest rank.
static double call_ms(const Measurement& x, char* recv, char* send, int calls) {
    device_synchronize();
    barrier();
    double began = seconds();
    for (int i = 0; i < calls; i++) run_call(x, recv, send);
    collectives_join();
    device_synchronize();
    double mine = (seconds() - began) * 1e3 / calls;
    std::vector<double> all(procs.world);
    gather_to_all(all.data(), &mine, sizeof mine);
    return *std::max_element(all.begin(), all.end());
}

int main(int argc, char** argv) {
    processes_start(&argc, &argv);
    if (!procs.connected) fatal("one process alone exchanges nothing: start it with mpirun -n RANKS");
    std::vector<Measurement> wanted;
    int64_t cp = 1;
    for (int i = 1; i < argc; i++) {
        char call[32] = "";
        int64_t value = 0;
        bool known = sscanf(argv[i], "%31[a-z_]=%ld", call, &value) == 2 && value >= 1;
        const char* name = NULL;
        for (const char* c : {"reduce_scatter", "all_gather", "all_to_all", "shift"}) if (!strcmp(call, c)) name = c;
        if (known && name) wanted.push_back({name, value, 0});
        else if (known && !strcmp(call, "cp")) cp = value;
        else fatal("\"%s\" is no measurement: give cp=RANKS, reduce_scatter=BYTES, all_gather=BYTES, all_to_all=BYTES, "
                   "shift=BYTES", argv[i]);
    }
    processes_split(cp);
    int64_t most = 0;
    for (Measurement& x : wanted) {
        bool in_groups = !strcmp(x.call, "all_to_all") || !strcmp(x.call, "shift");
        if (in_groups && cp == 1) fatal("%s is measured in groups: give cp=RANKS, 2 or more", x.call);
        x.ranks = in_groups ? procs.cp : procs.world;
        x.bytes = ceil_div(x.bytes, 256 * x.ranks) * 256 * x.ranks;
        most = std::max(most, x.bytes);
    }
    device_open(procs.local_rank);
    collectives_open();
    char *send = (char*)device_alloc(most), *recv = (char*)device_alloc(most);
    device_zero(send, most);  // sums of zeros stay finite; what the bytes are does not change the speed
    for (const Measurement& x : wanted) {
        double first = call_ms(x, recv, send, 1);  // a warm-up, and how long it takes
        int calls = (int)std::max(2.0, std::min(50.0, 100 / first));
        std::vector<double> ms;
        for (int i = 0; i < 5; i++) ms.push_back(call_ms(x, recv, send, calls));
        std::sort(ms.begin(), ms.end());
        double sent = (double)x.bytes * (x.ranks - 1) / x.ranks;
        say("{\"call\":\"%s\",\"ranks\":%d,\"bytes\":%ld,\"ms\":%.5f,\"sent_GBps\":%.3f}\n", x.call, x.ranks, x.bytes,
            ms[2], sent / ms[2] * 1e-6);
    }
    processes_end();
    return 0;
}
