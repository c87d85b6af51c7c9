/* What a server may do to a connection while it is not decided where it is served, and when it is elsewhere. Each
 * serves one request, waits until the next one is asked about, does something, and goes on as if nothing had been. */
#include "hazards.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <sys/wait.h>

static char buffer[8192];

static int wait_for_input(int fd)
{
	struct pollfd p = { fd, POLLIN, 0 };
	return poll(&p, 1, 20000);
}

/* Reads without waiting until something comes; says when the library begins to keep it back. */
static ssize_t read_all(int fd, int said)
{
	ssize_t n;
	while ((n = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT)) < 0 && errno == EAGAIN) {
		if (!said && wait_for_input(fd) == 1 && recv(fd, buffer, 1, MSG_PEEK | MSG_DONTWAIT) == -1 && errno == EAGAIN) {
			say("pending");
			return -1;
		}
		usleep(1000);
	}
	return n;
}

static void serve_once(int fd)
{
	if (read_all(fd, 1) <= 0)
		abort();
	respond(fd);
}

static void serve_rest(int fd)
{
	ssize_t n;
	while ((n = read_all(fd, 1)) > 0) {
		say("served here");
		respond(fd);
	}
	say("end %s", result(n));
}

/* `meanwhile` happens while the verdict is out. */
static void serve_pending(void (*meanwhile)(int fd))
{
	int listener = listen_on(80);
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		serve_once(fd);
		if (read_all(fd, 0) > 0) {
			say("served here");
			respond(fd);
		} else {
			meanwhile(fd);
		}
		serve_rest(fd);
		close(fd);
	}
}

static void child_closes(int fd)
{
	int status;
	pid_t child = fork();
	if (child == 0) {
		close(fd);
		_exit(4);
	}
	waitpid(child, &status, 0);
	say("child %d", WEXITSTATUS(status));
}

static void fork_close(void) { serve_pending(child_closes); }

/* The child waits for the end of what the parent has asked for, as another thread would. */
static void child_reads(int fd)
{
	int status;
	pid_t child = fork();
	if (child == 0)
		_exit(read(fd, buffer, sizeof buffer) == 0 ? 5 : 6);
	/* Long enough for it to look after the daemon. */
	usleep(700000);
	say("waited");
	waitpid(child, &status, 0);
	say("child %d", WEXITSTATUS(status));
}

static void fork_read(void) { serve_pending(child_reads); }

static void with_epoll(int fd, unsigned events)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event event = { .events = EPOLLIN | events };
	say("add %s", result(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)));
	event.events |= EPOLLOUT;
	say("both %s", result(epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event)));
	say("writable %s", result(epoll_wait(epoll, &event, 1, 1000)));
	say("write %s", result(send(fd, "x", 1, MSG_DONTWAIT)));
	say("remove %s", result(epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL)));
	event.events = EPOLLIN | EPOLLRDHUP | events;
	say("add again %s", result(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)));
	say("acted");
	ssize_t n;
	while ((n = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT)) < 0 && errno == EAGAIN)
		if (epoll_wait(epoll, &event, 1, 20000) != 1)
			say("never woken");
	if (n > 0) {
		say("served here");
		respond(fd);
	}
	say("remove %s", result(epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL)));
	close(epoll);
}

static void by_level(int fd) { with_epoll(fd, 0); }
static void by_edge(int fd) { with_epoll(fd, EPOLLET); }
static void epoll_level(void) { serve_pending(by_level); }
static void epoll_edge(void) { serve_pending(by_edge); }

/* The end is read again and again, in every way; nothing can be written. */
static void ended(int fd)
{
	struct iovec piece = { buffer, sizeof buffer };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1 };
	while (read_all(fd, 1) > 0)
		say("served here");
	for (int i = 0; i < 3; i++) {
		say("read %s", result(read(fd, buffer, sizeof buffer)));
		say("recv %s", result(recv(fd, buffer, sizeof buffer, 0)));
		say("peek %s", result(recv(fd, buffer, sizeof buffer, MSG_PEEK)));
		say("readv %s", result(readv(fd, &piece, 1)));
		say("recvmsg %s", result(recvmsg(fd, &message, 0)));
		say("write %s", result(write(fd, "x", 1)));
		say("send %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
		say("writev %s", result(writev(fd, &piece, 1)));
		say("poll %d", wait_for_input(fd));
		int other = dup(fd);
		say("by a duplicate %s", result(read(other, buffer, sizeof buffer)));
		close(other);
	}
	say("shutdown %s", result(shutdown(fd, SHUT_WR)));
	if (fork() == 0) {
		say("in a child %s", result(read(fd, buffer, sizeof buffer)));
		_exit(0);
	}
	wait(NULL);
}

static void after_gone(void) { serve_pending(ended); }

const struct hazard pending_hazards[] = {
	{ "fork_close", fork_close }, { "fork_read", fork_read }, { "pending_level", epoll_level },
	{ "pending_edge", epoll_edge }, { "after_gone", after_gone }, { NULL, NULL },
};
