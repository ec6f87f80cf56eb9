/* A wall clock that a file sets: what programs ask of the real-time clock is answered `offset` seconds later.
 *
 * Preloaded into every process of a system. Monotonic clocks are left alone. Waits until a wall-clock time are turned
 * into waits until the machine's, since the kernel knows no other; monotonic deadlines, which are far smaller, pass. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SINCE_2001 1000000000L

static const volatile long *offset;
static int (*cond_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*semaphore_timedwait)(sem_t *, const struct timespec *);
static long (*any_syscall)(long, ...);

__attribute__((constructor)) static void open_clock(void) {
    static const long none = 0;
    const char *path = getenv("CLAWRL_CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *found = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
    offset = found == MAP_FAILED ? &none : found;
    cond_timedwait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* x86-64; elsewhere there is one */
    if (!cond_timedwait) cond_timedwait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    semaphore_timedwait = dlsym(RTLD_NEXT, "sem_timedwait");
    any_syscall = dlsym(RTLD_NEXT, "syscall");
}

static long ahead(void) { return offset ? *offset : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    if (!now || clock_gettime(CLOCK_REALTIME, &precise)) return 0;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}

static const struct timespec *machines(const struct timespec *until, struct timespec *changed) {
    if (!until || until->tv_sec < SINCE_2001) return until;
    *changed = *until;
    changed->tv_sec -= ahead();
    return changed;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    struct timespec changed;
    return cond_timedwait(condition, mutex, machines(until, &changed));
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    struct timespec changed;
    return semaphore_timedwait(semaphore, machines(until, &changed));
}

long syscall(long number, ...) {
    va_list given;
    long a[6];
    struct timespec changed;
    va_start(given, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(given, long);
    va_end(given);
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME))
        a[3] = (long)machines((const struct timespec *)a[3], &changed);
    return any_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
