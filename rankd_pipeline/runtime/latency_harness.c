/* Times the generated C model as profile_script.py times onnxruntime: back to back, and paced with dirtied caches.
 *
 * Built together with the model and a small adapter (rankd_inputs, rankd_outputs, rankd_call, carried state).
 * usage: harness SAMPLES.bin RAW.bin paced back_to_back slot_ns deadline_ms burst_ms rest_ms warmup core dirt_bytes
 * SAMPLES.bin: sample after sample, each input after input. RAW.bin: three int64 counts, one int64 of flags
 * (1 memory locked, 2 real time), then int64 ns of back-to-back calls, paced calls, control, then the outputs after
 * stepping through the first samples once from zero state: proof of what was timed.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PROOF_STEPS 16

extern const int rankd_inputs, rankd_outputs;
extern const size_t rankd_input_bytes[], rankd_output_bytes[];
extern const int rankd_state[]; /* of each input: the output fed back into it, or -1 */
extern void rankd_call(void **inputs, void **outputs);

static void *inputs[64], *outputs[64];
static unsigned char *samples, *dirt;
static size_t sample_bytes, sample_count, dirt_bytes;
static int permitted;
static long control_turns;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int realtime(int on)
{
    struct sched_param p = {.sched_priority = on ? 10 : 0};
    return sched_setscheduler(0, on ? SCHED_FIFO : SCHED_OTHER, &p) == 0;
}

static void load(int64_t index)
{
    const unsigned char *row = samples + (size_t)(index % (int64_t)sample_count) * sample_bytes;
    for (int i = 0; i < rankd_inputs; i++) {
        memcpy(inputs[i], rankd_state[i] >= 0 ? outputs[rankd_state[i]] : (const void *)row, rankd_input_bytes[i]);
        row += rankd_input_bytes[i];
    }
}

/* Fixed arithmetic in registers: its tail is the host's own. */
static __attribute__((noinline)) void control(long turns)
{
    uint64_t x = 88172645463325252u;
    for (long i = 0; i < turns; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        __asm__ volatile("" : "+r"(x));
    }
}

static int64_t time_control(void)
{
    int64_t start = now_ns();
    control(control_turns);
    return now_ns() - start;
}

static int64_t time_call(void)
{
    int64_t start = now_ns();
    rankd_call(inputs, outputs);
    return now_ns() - start;
}

static void dirty(void)
{
    for (size_t i = 0; i < dirt_bytes; i += 64)
        dirt[i]++;
    __asm__ volatile("" : : "r"(dirt) : "memory");
}

/* Control as long as the fastest call: measured at 100,000 turns, scaled down. */
static void fit_control(void)
{
    int64_t call = INT64_MAX, fixed = INT64_MAX;
    for (int i = 0; i < 50; i++) {
        int64_t t = time_call();
        call = t < call ? t : call;
        control_turns = 100000;
        t = time_control();
        fixed = t < fixed ? t : fixed;
    }
    control_turns = (long)(100000.0 * (double)call / (double)fixed) + 1;
}

static int64_t run(int64_t runs, int64_t ends, int paced, int64_t slot_ns, int64_t burst_ns, int64_t rest_ns,
                   int64_t *calls, int64_t *controls)
{
    int64_t done = 0;
    while (done < runs && (done == 0 || now_ns() < ends)) {
        if (permitted)
            realtime(1);
        int64_t slot = now_ns(), stop = slot + burst_ns;
        while (done < runs && slot < stop) {
            if (paced) {
                dirty();
                controls[done] = time_control();
            }
            load(done);
            int64_t next = slot + slot_ns, reached = now_ns();
            slot = paced && next > reached ? next : reached;
            while (now_ns() < slot)
                ;
            calls[done++] = time_call();
        }
        if (permitted)
            realtime(0);
        struct timespec rest = {rest_ns / 1000000000, rest_ns % 1000000000};
        nanosleep(&rest, NULL);
    }
    return done;
}

static int read_samples(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        return 0;
    long size = ftell(file);
    rewind(file);
    for (int i = 0; i < rankd_inputs; i++)
        sample_bytes += rankd_input_bytes[i];
    sample_count = (size_t)size / sample_bytes;
    samples = malloc((size_t)size);
    int whole = sample_count > 0 && samples && fread(samples, 1, (size_t)size, file) == (size_t)size;
    fclose(file);
    return whole;
}

int main(int argc, char **argv)
{
    if (argc != 12 || rankd_inputs > 64 || rankd_outputs > 64 || !read_samples(argv[1]))
        return 2;
    int64_t paced = atoll(argv[3]), back = atoll(argv[4]), slot_ns = atoll(argv[5]);
    int64_t deadline_ns = atoll(argv[6]) * 1000000, burst_ns = atoll(argv[7]) * 1000000;
    int64_t rest_ns = atoll(argv[8]) * 1000000, warmup = atoll(argv[9]), core = atoll(argv[10]);
    dirt_bytes = (size_t)atoll(argv[11]);
    dirt = calloc(1, dirt_bytes);
    int64_t *back_ns = calloc((size_t)back + 1, 8), *paced_ns = calloc((size_t)paced + 1, 8);
    int64_t *control_ns = calloc((size_t)paced + 1, 8);
    for (int i = 0; i < rankd_inputs; i++)
        inputs[i] = aligned_alloc(64, (rankd_input_bytes[i] + 63) / 64 * 64);
    for (int i = 0; i < rankd_outputs; i++) {
        outputs[i] = aligned_alloc(64, (rankd_output_bytes[i] + 63) / 64 * 64);
        memset(outputs[i], 0, rankd_output_bytes[i]);
    }
    if (core >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((int)core, &set);
        sched_setaffinity(0, sizeof set, &set);
    }
    int locked = mlockall(MCL_CURRENT | MCL_FUTURE) == 0;
    permitted = realtime(1) && realtime(0);
    int64_t ends = now_ns() + deadline_ns;
    for (int64_t i = 0; i < warmup && now_ns() < ends; i++) {
        load(i);
        rankd_call(inputs, outputs);
    }
    fit_control();
    int64_t header[4] = {0, 0, 0, locked + 2 * permitted};
    header[0] = run(back, now_ns() + deadline_ns / 4, 0, slot_ns, burst_ns, rest_ns, back_ns, control_ns);
    header[1] = header[2] = run(paced, ends, 1, slot_ns, burst_ns, rest_ns, paced_ns, control_ns);
    FILE *file = fopen(argv[2], "wb");
    if (!file)
        return 2;
    fwrite(header, 8, 4, file);
    fwrite(back_ns, 8, (size_t)header[0], file);
    fwrite(paced_ns, 8, (size_t)header[1], file);
    fwrite(control_ns, 8, (size_t)header[2], file);
    for (int i = 0; i < rankd_outputs; i++)
        memset(outputs[i], 0, rankd_output_bytes[i]);
    for (int64_t i = 0; i < PROOF_STEPS; i++) {
        load(i);
        rankd_call(inputs, outputs);
    }
    for (int i = 0; i < rankd_outputs; i++)
        fwrite(outputs[i], 1, rankd_output_bytes[i], file);
    return fclose(file) ? 2 : 0;
}
