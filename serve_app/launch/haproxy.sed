# What ./haproxy changes in the configuration that Ray Serve writes for HAProxy.

# A body that is spliced hides from HAProxy 2.8 that its client left: the work goes on, and HAProxy
# spins on one core until it ends.
/^ *option splice-re/d

# Statistics and metrics are for this machine.
s/^\( *bind \)\*\{0,1\}:/\1127.0.0.1:/

# Headers that come a byte at a time are given up.
s/^defaults$/&\
    timeout http-request 20s/

# Serve answers "Internal Server Error" in plain text. Clients know what to do with these: a replica
# died before it answered, none is up, none answered in time.
s/^\( *\)errorfile 502 .*/\1http-error status 502 content-type application\/json string '{"type":"error","error":{"message":"the replica died before it answered; ask again","type":"server_error","param":null,"code":"unavailable"}}' hdr Retry-After 1/
s/^\( *\)errorfile 503 .*/\1http-error status 503 content-type application\/json string '{"type":"error","error":{"message":"no replica is up; ask again","type":"server_error","param":null,"code":"unavailable"}}' hdr Retry-After 1/
s/^\( *\)errorfile 504 .*/\1http-error status 504 content-type application\/json string '{"type":"error","error":{"message":"the replica did not answer in time","type":"timeout_error","param":null,"code":"timeout"}}'/
