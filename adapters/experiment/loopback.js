// Loaded into NNI's server before its own code: a server that names no address to listen on gets this machine's own.
// NNI names none, which means every network the machine is on, and asks nobody for a password.
'use strict';
const net = require('node:net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (port, ...rest) {
    const bare = Number.isInteger(port) && (rest.length === 0 || typeof rest[0] === 'function');
    return bare ? listen.call(this, port, '127.0.0.1', ...rest) : listen.call(this, port, ...rest);
};
