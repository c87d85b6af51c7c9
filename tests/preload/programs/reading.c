/* Ways to wait and to read. */
#include "hazards.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

static int wait_by_epoll(int fd, unsigned events)
{
	static int epoll = -1;
	struct epoll_event event = { .events = events, .data.fd = fd };
	if (epoll < 0)
		epoll = epoll_create1(EPOLL_CLOEXEC);
	/* A number that is new to the epoll, or one whose last connection has left it. */
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) && (events & EPOLLONESHOT))
		epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
	return epoll_wait(epoll, &event, 1, 10000);
}

static int by_level(int fd) { return wait_by_epoll(fd, EPOLLIN | EPOLLRDHUP); }
static int by_edge(int fd) { return wait_by_epoll(fd, EPOLLIN | EPOLLRDHUP | EPOLLET); }
static int by_oneshot(int fd) { return wait_by_epoll(fd, EPOLLIN | EPOLLONESHOT); }
static int by_exclusive(int fd) { return wait_by_epoll(fd, EPOLLIN | EPOLLEXCLUSIVE); }

static int by_poll(int fd)
{
	struct pollfd p = { fd, POLLIN, 0 };
	return poll(&p, 1, 10000);
}

static int by_ppoll(int fd)
{
	struct pollfd p = { fd, POLLIN, 0 };
	struct timespec t = { 10, 0 };
	return ppoll(&p, 1, &t, NULL);
}

static int by_select(int fd)
{
	fd_set set;
	struct timeval t = { 10, 0 };
	FD_ZERO(&set);
	FD_SET(fd, &set);
	return select(fd + 1, &set, NULL, NULL, &t);
}

static int by_pselect(int fd)
{
	fd_set set;
	struct timespec t = { 10, 0 };
	FD_ZERO(&set);
	FD_SET(fd, &set);
	return pselect(fd + 1, &set, NULL, NULL, &t, NULL);
}

static int (*wait_for_input)(int fd);

/* Reads as an event-driven server does: all there is, then waits. How often it was woken for nothing is not said. */
static ssize_t read_when_ready(int fd, char *buffer, size_t room)
{
	for (;;) {
		ssize_t n = read(fd, buffer, room);
		if (n >= 0 || errno != EAGAIN)
			return n;
		if (wait_for_input(fd) == 0)
			return -1;
	}
}

static void serve_events(int (*wait)(int))
{
	int listener = listen_on(80);
	wait_for_input = wait;
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		serve(fd, read_when_ready);
	}
}

static void epoll_level(void) { serve_events(by_level); }
static void epoll_edge(void) { serve_events(by_edge); }
static void epoll_oneshot(void) { serve_events(by_oneshot); }
static void epoll_exclusive(void) { serve_events(by_exclusive); }
static void with_poll(void) { serve_events(by_poll); }
static void with_ppoll(void) { serve_events(by_ppoll); }
static void with_select(void) { serve_events(by_select); }
static void with_pselect(void) { serve_events(by_pselect); }

/* As asio does: the socket is in the epoll before it listens, and accept is tried before the first wait. */
static void epoll_first(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1, epoll = epoll_create1(0), pair[2];
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(80) };
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	wait_for_input = by_poll;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (pipe(pair) || epoll_ctl(epoll, EPOLL_CTL_ADD, pair[0], &event) || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		abort();
	if (bind(fd, (struct sockaddr *)&to, sizeof to) || listen(fd, 64))
		abort();
	for (;;) {
		int client = accept4(fd, NULL, NULL, SOCK_NONBLOCK);
		if (client >= 0)
			serve(client, read_when_ready);
		else if (errno == EAGAIN)
			epoll_wait(epoll, &event, 1, -1);
	}
}

static ssize_t by_readv(int fd, char *buffer, size_t room)
{
	struct iovec pieces[3] = { { buffer, 5 }, { buffer + 5, 0 }, { buffer + 5, room - 5 } };
	return readv(fd, pieces, 3);
}

static ssize_t by_recvmsg(int fd, char *buffer, size_t room)
{
	struct iovec pieces[2] = { { buffer, 7 }, { buffer + 7, room - 7 } };
	struct msghdr message = { .msg_iov = pieces, .msg_iovlen = 2 };
	ssize_t n = recvmsg(fd, &message, 0);
	say("flags %d, pieces %zu", message.msg_flags, message.msg_iovlen);
	return n;
}

static ssize_t by_recvfrom(int fd, char *buffer, size_t room)
{
	struct sockaddr_in from;
	socklen_t len = sizeof from;
	ssize_t n = recvfrom(fd, buffer, room, 0, (struct sockaddr *)&from, &len);
	say("address of %u bytes", len);
	return n;
}

static ssize_t by_recvmmsg(int fd, char *buffer, size_t room)
{
	struct iovec piece = { buffer, room };
	struct mmsghdr message = { .msg_hdr = { .msg_iov = &piece, .msg_iovlen = 1 } };
	int n = recvmmsg(fd, &message, 1, 0, NULL);
	return n == 1 ? (ssize_t)message.msg_len : n;
}

static ssize_t by_small_reads(int fd, char *buffer, size_t room)
{
	return recv(fd, buffer, room < 9 ? room : 9, 0);
}

static ssize_t by_peek(int fd, char *buffer, size_t room)
{
	ssize_t peeked = recv(fd, buffer, room, MSG_PEEK), again = recv(fd, buffer, 4, MSG_PEEK | MSG_DONTWAIT);
	say("peek %zd %zd", peeked, again);
	return recv(fd, buffer, room, MSG_DONTWAIT);
}

/* The whole of a request of known length; then the same with more asked for than there is, ended by the client. */
static ssize_t by_waitall(int fd, char *buffer, size_t room)
{
	(void)room;
	return recv(fd, buffer, sizeof "GET /loc/1 HTTP/1.1\r\nHost: x\r\n\r\n" - 1, MSG_WAITALL);
}

static ssize_t by_waitall_two(int fd, char *buffer, size_t room)
{
	(void)room;
	ssize_t n = recv(fd, buffer, 2 * (sizeof "GET /loc/1 HTTP/1.1\r\nHost: x\r\n\r\n" - 1), MSG_WAITALL);
	if (n > 0)
		respond(fd);
	return n;
}

/* MSG_TRUNC on a stream throws the bytes away. */
static ssize_t by_trunc(int fd, char *buffer, size_t room)
{
	ssize_t n = recv(fd, buffer, 10, MSG_TRUNC);
	if (n <= 0)
		return n;
	say("thrown away %zd", n);
	return recv(fd, buffer, room, 0);
}

static void serve_with(reader *read_some)
{
	int listener = listen_on(80);
	for (;;)
		serve(accept_said(listener), read_some);
}

static void with_readv(void) { serve_with(by_readv); }
static void with_recvmsg(void) { serve_with(by_recvmsg); }
static void with_recvfrom(void) { serve_with(by_recvfrom); }
static void with_recvmmsg(void) { serve_with(by_recvmmsg); }
static void small_reads(void) { serve_with(by_small_reads); }
static void peek(void) { serve_with(by_peek); }
static void waitall(void) { serve_with(by_waitall); }
static void waitall_two(void) { serve_with(by_waitall_two); }
static void trunc_flag(void) { serve_with(by_trunc); }

static const char *try(int fd)
{
	char byte;
	return result(recv(fd, &byte, 1, MSG_PEEK));
}

static void set_by_child(int fd)
{
	if (fork() == 0) {
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
		_exit(0);
	}
	wait(NULL);
}

/* Every way to make a descriptor non-blocking, and back: nothing is there to read after the first request. */
static ssize_t by_mode(int fd, char *buffer, size_t room)
{
	int on = 1, off = 0, other;
	char first;
	ssize_t n = recv(fd, buffer, room, 0);
	if (n <= 0)
		return n;
	ioctl(fd, FIONBIO, &on);
	say("FIONBIO %s, %s", try(fd), result(read(fd, &first, 1)));
	ioctl(fd, FIONBIO, &off);
	fcntl(fd, F_SETFL, O_NONBLOCK);
	say("F_SETFL %s, %s", try(fd), result(read(fd, &first, 1)));
	fcntl(fd, F_SETFL, 0);
	other = dup(fd);
	fcntl(other, F_SETFL, O_NONBLOCK);
	say("by a duplicate %s, %s", try(fd), result(read(fd, &first, 1)));
	close(other);
	fcntl(fd, F_SETFL, 0);
	syscall(SYS_fcntl, fd, F_SETFL, O_NONBLOCK);
	say("by syscall %s, %s", try(fd), result(read(fd, &first, 1)));
	syscall(SYS_ioctl, fd, FIONBIO, &off);
	set_by_child(fd);
	say("by a child %s, %s", try(fd), result(read(fd, &first, 1)));
	fcntl(fd, F_SETFL, 0);
	return n;
}

static void modes(void) { serve_with(by_mode); }

/* SO_RCVTIMEO: says after how many tenths of a second a read gave up. */
static ssize_t by_timeout(int fd, char *buffer, size_t room)
{
	struct timeval limit = { 0, 300000 };
	struct timespec begun, now;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	clock_gettime(CLOCK_MONOTONIC, &begun);
	ssize_t n = recv(fd, buffer, room, 0);
	if (n < 0) {
		int error = errno;
		clock_gettime(CLOCK_MONOTONIC, &now);
		double took = now.tv_sec - begun.tv_sec + (now.tv_nsec - begun.tv_nsec) / 1e9;
		errno = error;
		say("gave up after %s: %s", took > 0.25 && took < 1.5 ? "about its limit" : "another time", result(n));
		limit.tv_usec = 0;
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
		n = recv(fd, buffer, room, 0);
	}
	return n;
}

static void timeouts(void) { serve_with(by_timeout); }

const struct hazard reading_hazards[] = {
	{ "epoll_level", epoll_level }, { "epoll_edge", epoll_edge }, { "epoll_oneshot", epoll_oneshot },
	{ "epoll_exclusive", epoll_exclusive }, { "poll", with_poll }, { "ppoll", with_ppoll },
	{ "epoll_first", epoll_first }, { "select", with_select }, { "pselect", with_pselect }, { "readv", with_readv }, { "recvmsg", with_recvmsg },
	{ "recvfrom", with_recvfrom }, { "recvmmsg", with_recvmmsg }, { "small_reads", small_reads }, { "peek", peek },
	{ "waitall", waitall }, { "waitall_two", waitall_two }, { "trunc", trunc_flag }, { "modes", modes },
	{ "timeouts", timeouts }, { NULL, NULL },
};
