/* Known functions, lines and objects; compiled with -g, and stripped of debug information in another test. */
int first_object[1024] = {1};
int second_object[1024];

int known_function(int x)
{
    return x * 3 + first_object[x & 7]; /* KNOWN LINE */
}

int main(void) { return known_function(second_object[3]) & 0; }
