/* Shuts the ext4 file system at a path down, as after an error of its disk (EXT4_IOC_SHUTDOWN). */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>

int main(int count, char **arguments) {
    uint32_t without_log = 2;
    int folder = count == 2 ? open(arguments[1], O_RDONLY) : -1;
    if (folder < 0 || ioctl(folder, _IOR('X', 125, uint32_t), &without_log) != 0) {
        perror("shutdown");
        return 1;
    }
    return 0;
}
