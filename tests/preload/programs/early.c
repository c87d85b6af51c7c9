/* A library whose constructor uses sockets before anybody else has been initialised. */
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

__attribute__((constructor)) static void early(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET };
	struct epoll_event event = { .events = EPOLLIN };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), epoll = epoll_create1(0);
	char byte;
	if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof any) || listen(fd, 1) || accept(fd, NULL, NULL) != -1)
		abort();
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) || epoll_wait(epoll, &event, 1, 0) != 0)
		abort();
	if (read(fd, &byte, 1) != -1 || close(dup(fd)) || close(fd) || close(epoll) || close(fd) != -1)
		abort();
	setenv("EARLY", "done", 1);
}
