/* A disk whose flush takes FLUSH_MICROSECONDS: loaded before libc with LD_PRELOAD.

   It does not flush, as the time of the real disk would make figures vary. */

#include <stdlib.h>
#include <time.h>

int fdatasync(int fd)
{
    const char *set = getenv("FLUSH_MICROSECONDS");
    long micros = set ? atol(set) : 0;
    struct timespec pause = {micros / 1000000, micros % 1000000 * 1000};

    (void)fd;
    while (nanosleep(&pause, &pause) != 0)
        ;
    return 0;
}
