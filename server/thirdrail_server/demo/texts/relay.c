#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define TRIP_AMPERES 630

typedef struct {
    uint16_t amperes;
    int tripped;
} relay_t;

static void relay_update(relay_t *relay, uint16_t amperes)
{
    relay->amperes = amperes;
    if (amperes > TRIP_AMPERES) {
        relay->tripped = 1;
    }
}

int main(int argc, char **argv)
{
    relay_t relay = {0, 0};
    for (int i = 1; i < argc; i++) {
        relay_update(&relay, (uint16_t)atoi(argv[i]));
    }
    printf("%s\n", relay.tripped ? "tripped" : "closed");
    return relay.tripped ? EXIT_FAILURE : EXIT_SUCCESS;
}
