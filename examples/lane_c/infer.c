/* SPDX-License-Identifier: Apache-2.0
 *
 * Calls a model over the lane: one input `x` and one output, both FP32.
 *
 * Usage: infer SOCKET TOKEN MODEL BYTES     (SOCKET and TOKEN from `thirdrail sessions open`)
 */
#define _GNU_SOURCE
#include "lane.h"

enum { FP32 = 12 }; /* of thirdrail.v1.DataType */

struct ref {
    uint64_t epoch, chunk, offset, size, slot, generation;
};

/* Where the input goes: the start of the first chunk, which nothing else uses. */
static float *open_input(struct lane *lane, size_t bytes) {
    struct message grow = {0}, packet = {0};
    put_number(&grow, 1, bytes);
    put_message(&packet, 4, &grow);
    send_message(lane, &packet);
    receive_kind(lane, 3);
    struct chunk *chunk = &lane->chunks[ROLE_INPUT][0];
    if (!chunk->memory || chunk->size < bytes) fail(EXIT_BROKEN, "the chunk is not what we asked for");
    return (float *)(void *)chunk->memory;
}

static void send_request(const struct lane *lane, const char *model, size_t bytes) {
    struct message packet = {0}, infer = {0}, tensor = {0}, shape = {0}, ref = {0};
    put_number(&ref, 1, lane->epochs[ROLE_INPUT]);
    put_number(&ref, 4, bytes); /* chunk 0 and offset 0 are what is meant by leaving them out */
    put_varint(&shape, bytes / sizeof(float));
    put_text(&tensor, 1, "x");
    put_number(&tensor, 2, FP32);
    put_message(&tensor, 3, &shape);
    put_message(&tensor, 6, &ref);
    put_number(&infer, 1, 1); /* the call's number */
    put_text(&infer, 2, model);
    put_message(&infer, 6, &tensor);
    put_message(&packet, 2, &infer);
    send_message(lane, &packet);
}

static struct ref read_ref(struct view message) {
    struct ref ref = {0};
    uint64_t *fields[] = {&ref.epoch, &ref.chunk, &ref.offset, &ref.size, &ref.slot, &ref.generation};
    struct field field;
    while (next(&message, &field) > 0)
        if (field.number <= 6) *fields[field.number - 1] = field.value;
    return ref;
}

/* The first output's bytes: in the packet (ref->slot is 0 then), or in a slot, which is ours until we
 * release it. */
static struct view receive_result(struct lane *lane, struct ref *ref) {
    struct view response = receive_kind(lane, 2), tensor = {0}, raw = {0};
    struct field field;
    while (next(&response, &field) > 0) {
        if (field.number == 5) fail_with_status(field.data);
        if (field.number == 8 && !tensor.at) tensor = field.data;
    }
    while (next(&tensor, &field) > 0) {
        if (field.number == 4) raw = field.data;
        if (field.number == 6) *ref = read_ref(field.data);
    }
    if (ref->slot == 0) return raw;
    const struct chunk *chunk = ref->chunk < CHUNKS_MAX ? &lane->chunks[ROLE_OUTPUT][ref->chunk] : NULL;
    if (!chunk || !chunk->memory || ref->epoch != lane->epochs[ROLE_OUTPUT] ||
        ref->offset > chunk->size || ref->size > chunk->size - ref->offset)
        fail(EXIT_BROKEN, "the result lies outside the output arena");
    return (struct view){chunk->memory + ref->offset, ref->size};
}

static void release(const struct lane *lane, const struct ref *ref) {
    struct message lease = {0}, packet = {0};
    put_number(&lease, 1, ref->epoch);
    put_number(&lease, 2, ref->slot);
    put_number(&lease, 3, ref->generation);
    put_message(&packet, 5, &lease);
    send_message(lane, &packet);
}

static void print_result(struct view result, const struct ref *ref) {
    size_t count = result.size / sizeof(float);
    double sum = 0;
    float each = 0;
    for (size_t i = 0; i < count; i++) {
        memcpy(&each, result.at + i * sizeof each, sizeof each); /* inline bytes lie anywhere */
        sum += each;
    }
    printf("%zu elements, %s, last %g, sum %.17g\n", count,
           ref->slot ? "in shared memory" : "in the packet", (double)each, sum);
}

int main(int count, char **arguments) {
    static struct lane lane;
    uint8_t token[TOKEN_BYTES];
    if (count != 5 || strlen(arguments[2]) != 2 * sizeof token)
        fail(EXIT_USAGE, "usage: infer SOCKET TOKEN MODEL BYTES");
    for (size_t i = 0; i < sizeof token; i++)
        if (sscanf(arguments[2] + 2 * i, "%2hhx", &token[i]) != 1)
            fail(EXIT_USAGE, "the token is not hexadecimal");
    size_t bytes = strtoul(arguments[4], NULL, 10) / sizeof(float) * sizeof(float);
    if (bytes == 0) fail(EXIT_USAGE, "BYTES must be 4 or more");

    connect_to(&lane, arguments[1]);
    say_hello(&lane, token);
    float *x = open_input(&lane, bytes);
    for (size_t i = 0; i < bytes / sizeof *x; i++) x[i] = (float)i;
    send_request(&lane, arguments[3], bytes);
    struct ref ref = {0};
    struct view result = receive_result(&lane, &ref);
    print_result(result, &ref);
    if (ref.slot) release(&lane, &ref);
    say_goodbye(&lane);
    return 0;
}
