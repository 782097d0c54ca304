/* SPDX-License-Identifier: Apache-2.0
 *
 * As much of protobuf's wire format as the lane needs, packed and unpacked by hand. A message is a row
 * of fields; a field is a varint `number << 3 | type` and then a varint (type 0), or a varint length
 * and so many bytes (type 2). Numbers that this program does not know are skipped, as everywhere.
 */
#ifndef WIRE_H
#define WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MESSAGE_BYTES_MAX 1024 /* of what this program sends */

/* Writing: a message that never exceeds its array; `ok` says whether all of it fitted. */
struct message {
    uint8_t bytes[MESSAGE_BYTES_MAX];
    size_t size;
    bool overflowed;
};

static inline void put_raw(struct message *to, const void *data, size_t size) {
    if (size > sizeof to->bytes - to->size) {
        to->overflowed = true;
        return;
    }
    if (size > 0) memcpy(to->bytes + to->size, data, size);
    to->size += size;
}

static inline void put_varint(struct message *to, uint64_t value) {
    do {
        uint8_t byte = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        put_raw(to, &byte, 1);
        value >>= 7;
    } while (value > 0);
}

static inline void put_number(struct message *to, uint32_t field, uint64_t value) {
    put_varint(to, (uint64_t)field << 3);
    put_varint(to, value);
}

static inline void put_bytes(struct message *to, uint32_t field, const void *data, size_t size) {
    put_varint(to, (uint64_t)field << 3 | 2);
    put_varint(to, size);
    put_raw(to, data, size);
}

static inline void put_text(struct message *to, uint32_t field, const char *text) {
    put_bytes(to, field, text, strlen(text));
}

static inline void put_message(struct message *to, uint32_t field, const struct message *inner) {
    put_bytes(to, field, inner->bytes, inner->size);
    to->overflowed |= inner->overflowed;
}

/* Reading: a view of bytes that somebody else owns. `next` moves through it. */
struct view {
    const uint8_t *at;
    size_t size;
};

struct field {
    uint32_t number;
    uint64_t value;   /* of a varint */
    struct view data; /* of anything with a length */
};

static inline bool take_varint(struct view *from, uint64_t *value) {
    *value = 0;
    for (unsigned shift = 0; shift < 64 && from->size > 0; shift += 7) {
        uint8_t byte = *from->at;
        from->at++, from->size--;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) return true;
    }
    return false;
}

/* 1: the next field; 0: the message's end; -1: this is no message. */
static inline int next(struct view *from, struct field *field) {
    if (from->size == 0) return 0;
    uint64_t key, size;
    memset(field, 0, sizeof *field);
    if (!take_varint(from, &key) || key >> 3 == 0 || key >> 3 > 0x1fffffff) return -1;
    field->number = (uint32_t)(key >> 3);
    switch (key & 7) {
    case 0: return take_varint(from, &field->value) ? 1 : -1;
    case 1: size = 8; break;
    case 2:
        if (!take_varint(from, &size)) return -1;
        break;
    case 5: size = 4; break;
    default: return -1;
    }
    if (size > from->size) return -1;
    field->data = (struct view){from->at, (size_t)size};
    from->at += size, from->size -= (size_t)size;
    return 1;
}

#endif
