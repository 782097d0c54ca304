/* SPDX-License-Identifier: Apache-2.0
 *
 * One session on the lane: the socket, the packets, the memory. docs/lane.md is the specification; the
 * field numbers are those of protos/thirdrail/v1/lane.proto. Whatever the worker sends is checked
 * before it is used, and what cannot be used ends the program, which a library would not do.
 */
#ifndef LANE_H
#define LANE_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "wire.h"

enum { EXIT_REFUSED = 1, EXIT_USAGE = 2, EXIT_BROKEN = 3 };
enum { VERSION = 1, ROLE_INPUT = 1, ROLE_OUTPUT = 2, TOKEN_BYTES = 16 };
enum { PACKET_BYTES_MAX = 1 << 16, CHUNKS_MAX = 4, ANSWER_S_MAX = 20 };

struct chunk {
    uint8_t *memory;
    size_t size;
};

struct lane {
    int socket;
    uint64_t epochs[3];               /* by role */
    struct chunk chunks[3][CHUNKS_MAX]; /* by role and number */
    uint8_t packet[PACKET_BYTES_MAX]; /* the last one; views of it are good until the next */
};

static inline _Noreturn void fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("infer: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(status);
}

static inline void send_message(const struct lane *lane, const struct message *message) {
    if (message->overflowed) fail(EXIT_USAGE, "the request is longer than %d bytes", MESSAGE_BYTES_MAX);
    if (send(lane->socket, message->bytes, message->size, MSG_NOSIGNAL) < 0)
        fail(EXIT_BROKEN, "the worker is gone: %s", strerror(errno));
}

/* The next packet, and the file descriptor beside it or -1. */
static inline struct view receive_packet(struct lane *lane, int *fd) {
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {lane->packet, sizeof lane->packet};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    header.msg_control = &control, header.msg_controllen = sizeof control;
    ssize_t size;
    do /* a reset is told once, before what the worker had sent by then */
        size = recvmsg(lane->socket, &header, MSG_CMSG_CLOEXEC);
    while (size < 0 && (errno == EINTR || errno == ECONNRESET));
    if (size < 0) fail(EXIT_BROKEN, "no answer: %s", strerror(errno));
    if (size == 0) fail(EXIT_BROKEN, "the worker hung up");
    if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) fail(EXIT_BROKEN, "a packet is too large");
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    *fd = -1;
    if (first && first->cmsg_level == SOL_SOCKET && first->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(first), sizeof *fd);
    return (struct view){lane->packet, (size_t)size};
}

/* Memory that cannot shrink under our feet, and has the announced size; or no memory at all. */
static inline void add_chunk(struct lane *lane, struct view message, int fd) {
    uint64_t role = 0, epoch = 0, number = 0, size = 0;
    struct field field;
    struct stat status;
    while (next(&message, &field) > 0) {
        if (field.number == 1) role = field.value;
        if (field.number == 2) epoch = field.value;
        if (field.number == 3) number = field.value;
        if (field.number == 4) size = field.value;
    }
    if (role != ROLE_INPUT && role != ROLE_OUTPUT) fail(EXIT_BROKEN, "a chunk of no known role");
    if (epoch != lane->epochs[role] || number >= CHUNKS_MAX || lane->chunks[role][number].memory)
        fail(EXIT_BROKEN, "chunk %" PRIu64 " of epoch %" PRIu64 " is none of ours", number, epoch);
    int seals = fcntl(fd, F_GET_SEALS), wanted = F_SEAL_SHRINK | F_SEAL_GROW;
    if (seals < 0 || (seals & wanted) != wanted || fstat(fd, &status) < 0 ||
        (uint64_t)status.st_size != size || size == 0)
        fail(EXIT_BROKEN, "a chunk of %" PRIu64 " bytes is not sealed so", size);
    int access = role == ROLE_INPUT ? PROT_READ | PROT_WRITE : PROT_READ;
    void *memory = mmap(NULL, size, access, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) fail(EXIT_BROKEN, "cannot map a chunk: %s", strerror(errno));
    close(fd);
    lane->chunks[role][number] = (struct chunk){memory, size};
}

static inline void fail_with_status(struct view status) {
    struct field field;
    while (next(&status, &field) > 0)
        if (field.number == 2)
            fail(EXIT_REFUSED, "%.*s", (int)field.data.size, (const char *)field.data.at);
    fail(EXIT_REFUSED, "refused without a word");
}

/* The next message of this kind (a field number of LaneResponse); chunks on the way are mapped. */
static inline struct view receive_kind(struct lane *lane, uint32_t kind) {
    for (;;) {
        int fd;
        struct view packet = receive_packet(lane, &fd);
        struct field message, reason;
        if (next(&packet, &message) <= 0) fail(EXIT_BROKEN, "a packet is no LaneResponse");
        if (message.number == 3) /* Chunk */
            add_chunk(lane, message.data, fd);
        else if (fd >= 0)
            close(fd);
        if (message.number == 5 && next(&message.data, &reason) > 0) /* Goodbye */
            fail_with_status(reason.data);
        if (message.number == 4 && kind == 3) /* GrowRefused: its field 2 is the text, as in Status */
            fail_with_status(message.data);
        if (message.number == kind) return message.data;
    }
}

static inline void connect_to(struct lane *lane, const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = ANSWER_S_MAX};
    struct ucred server;
    socklen_t size = sizeof server;
    if (strlen(path) >= sizeof address.sun_path) fail(EXIT_USAGE, "the path is too long");
    strcpy(address.sun_path, path);
    lane->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (lane->socket < 0 || connect(lane->socket, (struct sockaddr *)&address, sizeof address) < 0)
        fail(EXIT_BROKEN, "cannot connect to %s: %s", path, strerror(errno));
    setsockopt(lane->socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (getsockopt(lane->socket, SOL_SOCKET, SO_PEERCRED, &server, &size) < 0 ||
        (server.uid != geteuid() && server.uid != 0)) /* anybody may bind a path in a shared folder */
        fail(EXIT_BROKEN, "%s is not ours or root's", path);
}

static inline void say_hello(struct lane *lane, const uint8_t *token) {
    struct message hello = {0}, packet = {0};
    struct field field;
    put_number(&hello, 1, VERSION);
    put_number(&hello, 2, VERSION);
    put_bytes(&hello, 4, token, TOKEN_BYTES);
    put_text(&hello, 5, "lane_c");
    put_message(&packet, 1, &hello);
    send_message(lane, &packet);
    struct view attached = receive_kind(lane, 1);
    while (next(&attached, &field) > 0) {
        if (field.number == 4) lane->epochs[ROLE_INPUT] = field.value;
        if (field.number == 5) lane->epochs[ROLE_OUTPUT] = field.value;
    }
}

/* `Close` says that we do not use the memory any more, so it is unmapped first. */
static inline void say_goodbye(struct lane *lane) {
    for (int role = ROLE_INPUT; role <= ROLE_OUTPUT; role++)
        for (int number = 0; number < CHUNKS_MAX; number++)
            if (lane->chunks[role][number].memory)
                munmap(lane->chunks[role][number].memory, lane->chunks[role][number].size);
    struct message close_message = {0}, packet = {0};
    put_message(&packet, 12, &close_message);
    send_message(lane, &packet);
    close(lane->socket);
}

#endif
