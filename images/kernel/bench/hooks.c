// SPDX-License-Identifier: GPL-2.0
/*
 * What a process that uses no mshare pays for the hooks of the series: the cost
 * of operations whose code the series touches, read from the time stamp
 * counter. Meant for an emulator whose counter counts executed instructions;
 * the first line, a loop of known length, shows whether it does.
 *
 * Each line is "hooks: NAME COUNT MIN": operations in a round, and the lowest
 * reading of a round.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE		4096UL
#define PAGES		256UL
#define SIZE		(PAGES * PAGE)
#define ROUNDS		40
#define LOOP		1000000UL
/* Pages of one vmsplice(): a pipe's default capacity. */
#define SPLICE		16UL

static int memfd;
static int pipes[2];
static char *area;
static char scratch[SPLICE * PAGE];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	uint32_t low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static char *map(int flags, int fd)
{
	char *at = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static void unmap(char *at)
{
	if (munmap(at, SIZE))
		die("munmap");
}

static void touch(char *at)
{
	for (unsigned long i = 0; i < PAGES; i++)
		*(volatile char *)(at + i * PAGE) = 1;
}

static uint64_t loop(void)
{
	unsigned long n = LOOP;
	uint64_t start = now();

	/* Two instructions each time. */
	asm volatile("1: dec %0; jnz 1b" : "+r"(n) : : "cc");
	return now() - start;
}

static uint64_t nothing(void)
{
	uint64_t start = now();

	return now() - start;
}

static uint64_t fault_anon(void)
{
	char *at = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uint64_t start = now(), end;

	touch(at);
	end = now();
	unmap(at);
	return end - start;
}

static uint64_t fault_file(void)
{
	char *at = map(MAP_SHARED, memfd);
	uint64_t start = now(), end;

	touch(at);
	end = now();
	unmap(at);
	return end - start;
}

static uint64_t fork_exit(void)
{
	uint64_t start = now();
	int status;
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		die("fork");
	return now() - start;
}

static uint64_t mmap_munmap(void)
{
	uint64_t start = now();

	unmap(map(MAP_SHARED, memfd));
	return now() - start;
}

static uint64_t munmap_full(void)
{
	char *at = map(MAP_SHARED, memfd);
	uint64_t start;

	touch(at);
	start = now();
	unmap(at);
	return now() - start;
}

static uint64_t protect(void)
{
	uint64_t start = now();

	if (mprotect(area, SIZE, PROT_READ) ||
	    mprotect(area, SIZE, PROT_READ | PROT_WRITE))
		die("mprotect");
	return now() - start;
}

static uint64_t move(void)
{
	char *to = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *from = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uint64_t start, end;

	touch(from);
	start = now();
	if (mremap(from, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		die("mremap");
	end = now();
	unmap(to);
	return end - start;
}

static uint64_t gup_fast(void)
{
	struct iovec iov = { area, SPLICE * PAGE };
	uint64_t start = now(), end;

	if (vmsplice(pipes[1], &iov, 1, 0) != SPLICE * PAGE)
		die("vmsplice");
	end = now();
	if (read(pipes[0], scratch, sizeof(scratch)) != sizeof(scratch))
		die("read");
	return end - start;
}

static uint64_t gup_slow(void)
{
	struct iovec to = { scratch, sizeof(scratch) };
	struct iovec from = { area, sizeof(scratch) };
	uint64_t start = now();

	if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != sizeof(scratch))
		die("process_vm_readv");
	return now() - start;
}

static uint64_t residency(void)
{
	static unsigned char pages[PAGES];
	uint64_t start = now();

	if (mincore(area, SIZE, pages))
		die("mincore");
	return now() - start;
}

static const struct {
	const char *name;
	unsigned long count;
	uint64_t (*round)(void);
} table[] = {
	{ "loop", LOOP, loop },
	{ "nothing", 1, nothing },
	{ "fault-anon", PAGES, fault_anon },
	{ "fault-shared-file", PAGES, fault_file },
	{ "fork-exit-wait", 1, fork_exit },
	{ "mmap-munmap", 1, mmap_munmap },
	{ "munmap-populated-page", PAGES, munmap_full },
	{ "mprotect-page", 2 * PAGES, protect },
	{ "mremap-page", PAGES, move },
	{ "gup-fast-page", SPLICE, gup_fast },
	{ "process_vm_readv-page", SPLICE, gup_slow },
	{ "mincore-page", PAGES, residency },
};

int main(void)
{
	memfd = memfd_create("hooks", 0);
	if (memfd < 0 || ftruncate(memfd, SIZE) || pipe(pipes))
		die("set up");
	area = map(MAP_SHARED, memfd);
	touch(area);
	for (size_t i = 0; i < sizeof(table) / sizeof(*table); i++) {
		uint64_t least = UINT64_MAX;

		for (int round = 0; round < ROUNDS; round++) {
			uint64_t took = table[i].round();

			if (took < least)
				least = took;
		}
		printf("hooks: %s %lu %llu\n", table[i].name, table[i].count,
		       (unsigned long long)least);
		fflush(stdout);
	}
	return 0;
}
